"""Tensors of a snapshot cut into chunks, each with where it belongs, before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES

Position: TypeAlias = "tuple[str, int]"
"""A tensor's name, and the index of a chunk in it."""


@dataclass(frozen=True)
class Item:
    """Chunk `index` of a tensor; `name` is its digest, once it is `named`."""

    tensor: str
    index: int
    dtype: str
    raw: memoryview
    name: str = ""

    @property
    def position(self) -> Position:
        """Where it belongs."""
        return self.tensor, self.index

    def named(self) -> Item:
        """With its digest."""
        return replace(self, name=digest(self.raw))


def chunks_of(tensor: TensorBytes) -> list[Item]:
    """The chunks of one tensor, in order."""
    return [
        Item(tensor.name, index, tensor.dtype, tensor.data[start : start + CHUNK_BYTES])
        for index, start in enumerate(range(0, len(tensor.data), CHUNK_BYTES))
    ]


def items_of(snapshot: Snapshot) -> list[Item]:
    """All chunks of a snapshot, in order."""
    return [item for tensor in snapshot.tensors for item in chunks_of(tensor)]
