"""A series of states, and its snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store

Tensors = dict[str, torch.Tensor]
SMALL = SaveOptions("small", keyframe_every=3)


def series(length: int, seed: int = 0) -> Iterator[Tensors]:
    """A training in miniature: weights that drift, moments that do not stay, what is frozen, a
    bf16 copy, a target network that follows, and a tensor of several chunks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, frozen, target = random(300, 1000), random(50_000), torch.zeros(300, 1000)
    for step in range(length):
        yield {
            "weight": weight,
            "moment": random(40_000),
            "frozen": frozen,
            "half": weight.bfloat16(),
            "target": target,
            "step": torch.tensor(step),
            "none": torch.zeros(0),
        }
        if step % 2:
            target = weight
        weight = weight * (1 + 1e-6 * random(300, 1000))


def taken(step: int, tensors: Tensors, rank: int = 0, ranks: int = 1, **identity: Any) -> Snapshot:
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    id = checkpoint_id(step, "a0")
    return capture.take({"m": own}, id=id, rank=rank, world_size=ranks, **identity)


def files_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def assert_holds(store: Store, id: str, expected: Tensors, rank: int = 0) -> None:
    back = restore.read(store, store.directory(id), rank).states["m"]
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)


# A series
