from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter

Save = Callable[..., str]


def state_of(step: int, rank: int = 0, width: int = 64) -> dict[str, Any]:
    """A model and an optimizer with a different content for every step and rank."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    weight = torch.randn(width, width, generator=generator)
    return {
        "model": {"w": weight, "tied": weight, "b": torch.zeros(0), "half": weight.bfloat16()},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "lr": (0.1, 1e-3)},
        "rng": {"torch": generator.get_state()},
    }


def snapshots(
    step: int,
    *,
    token: str = "a0",
    ranks: int = 2,
    lineage: Sequence[str] = (),
    width: int = 64,
) -> list[Snapshot]:
    def one(rank: int) -> Snapshot:
        state = state_of(step, rank, width)
        return capture.take(
            state,
            id=checkpoint_id(step, token),
            rank=rank,
            world_size=ranks,
            lineage=tuple(lineage),
            model=capture.structure_of(state["model"]),
            rng=True,
            created=1_700_000_000.0 + step,
        )

    return [one(rank) for rank in range(ranks)]


@pytest.fixture(scope="session")
def snaps() -> Callable[..., list[Snapshot]]:
    return snapshots


@pytest.fixture(scope="session")
def state() -> Callable[..., dict[str, Any]]:
    return state_of


@pytest.fixture(scope="session")
def save() -> Save:
    """`save(store, step, token=, ranks=, lineage=, width=)` by all ranks; returns the id."""

    def save(store: Store, step: int, **options: Any) -> str:
        taken = snapshots(step, **options)
        for each in taken:
            PartWriter(store, share=False).persist(each)
        return taken[0].id

    return save
