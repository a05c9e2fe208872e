"""A directory of checkpoints of two ranks, and a gatekeeper before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.part import pack_file
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.gate import Expectation
from autoglm_resume.checkpoint.store.gatekeeper import Gatekeeper, WaysOut
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.events import Event
from autoglm_resume.locks import CHECKPOINTS
from autoglm_resume.supervise.ranks.fault_injector import flip_a_bit
from autoglm_resume.worker.base import rng
from tests.lines import line

WIDTH = 32
STRUCTURE = capture.structure_of({"model.w": torch.zeros(WIDTH, WIDTH)})


class Checkpoints:
    """Checkpoints below `directory`, and what gatekeepers told about them."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkpoints"
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.directory = directory
        self.store = Store(self.root)

    def tell(self, event: Event, /) -> None:
        self.told.append(line(event))

    def gatekeeper(self, checkpointed: int = 0, **expected: Any) -> Gatekeeper:
        ways = WaysOut("run as many ranks", "go back to the model", "start over")
        expectation = Expectation(**{"world_size": 2, **expected})
        return Gatekeeper(self.store, expectation, self.tell, ways, checkpointed)

    def save(self, step: int, ranks: int = 2, only: int | None = None, token: str = "a0") -> str:
        for rank in range(ranks) if only is None else [only]:
            weight = torch.randn(
                WIDTH, WIDTH, generator=torch.Generator().manual_seed(step * 100 + rank)
            )
            taken = capture.take(
                {"model": {"w": weight}, "rng": rng.capture()},
                id=checkpoint_id(step, token),
                rank=rank,
                world_size=ranks,
                lineage=(checkpoint_id(step - 10, "a0"),),
                model=STRUCTURE,
            )
            PartWriter(self.store, share=False).persist(taken)
        return taken.id

    def damage(self, id: str, rank: int = 1) -> None:
        # flip_a_bit keeps the times as a bad disk would, except the ctime.
        flip_a_bit(self.store.directory(id) / pack_file(rank))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.told if event == name]

    def listing(self) -> dict[str, bytes | None]:
        """Every file with its content, every directory; who had the lock last does not count."""
        return {
            str(path.relative_to(self.directory)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.directory.rglob("*"))
            if path.name != CHECKPOINTS
        }
