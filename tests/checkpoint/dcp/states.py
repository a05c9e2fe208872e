"""States that are saved and loaded through DCP, of one rank and of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from autoglm_resume.checkpoint.dcp import Reader, Writer, directory_of
from tests.checkpoint.ranks import ranks

ID = "step-0000000100.dcp"


def state(seed: int) -> dict[str, Any]:
    """A replicated state of more than one chunk, every kind of value in it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(700, 1000, generator=generator)
    return {
        "model": {
            "w": weight,
            "transposed": torch.randn(6, 4, generator=generator).T,
            "half": weight[:3].bfloat16(),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(float(seed)),
            "mask": weight[0] > 0,
        },
        "optimizer": {"state": {0: {"step": torch.tensor(float(seed))}}, "betas": (0.9, 0.95)},
        "step": seed,
        "a/odd name@0,0": torch.ones(2) * seed,
    }


def tensors(tree: object) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values: Sequence[object] = list(tree.values()) if isinstance(tree, dict) else []
    return [found for value in values for found in tensors(value)]


def equal(one: object, other: object) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def save(path: Path, seed: int = 1, **options: Any) -> Path:
    dcp.save(state(seed), checkpoint_id=path, storage_writer=Writer(**options))
    return directory_of(path)


def load(path: Path, into: dict[str, Any]) -> dict[str, Any]:
    dcp.load(into, storage_reader=Reader(path))
    return into


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


# A model of FSDP2, whose shards are of unequal size


def sharded(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.GELU(), torch.nn.Linear(53, 5))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 37)).sum().backward()
    optimizer.step()
    return model, optimizer


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = tensors(list_to_dict(get_state_dict(model, optimizer)))
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for t in found]


def list_to_dict(states: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), states, strict=True))


def save_sharded(root: Path, save: Callable[[dict[str, Any], Path], None]) -> None:
    """By two ranks, as step 100, with the whole tensors beside it in expected.pt."""

    def train(rank: int) -> None:
        model, optimizer = sharded(1)
        expected = whole(model, optimizer)
        save(list_to_dict(get_state_dict(model, optimizer)), root / "step-100")
        if rank == 0:
            torch.save(expected, root / "expected.pt")

    ranks(root, 2, train)


def plain_save(states: dict[str, Any], path: Path) -> None:
    dcp.save(states, checkpoint_id=path, storage_writer=Writer(compress="fast"))


def check_sharded(root: Path, world_size: int) -> None:
    """That ranks with another model and optimizer load all of expected.pt."""

    def train(rank: int) -> None:
        model, optimizer = sharded(2)
        into = list_to_dict(get_state_dict(model, optimizer))
        dcp.load(into, storage_reader=Reader(root / "step-100"))
        set_state_dict(
            model, optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"]
        )
        expected = torch.load(root / "expected.pt")
        found = whole(model, optimizer)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    ranks(root, world_size, train)
