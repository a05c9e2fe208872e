"""A rank's state at one step, as bytes: all that persisting it needs.

In a slot of shared memory a snapshot is the bytes of its tensors, each at an aligned offset, and
after them a JSON description of everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

from autoglm_resume.checkpoint.format.document import Json, compact
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.format.parameters import Parameters
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.format.tables import DTYPE_BYTES

ALIGNMENT = 64
"""Bytes: a cache line, more than any type needs."""


@dataclass(frozen=True)
class TensorBytes:
    """`data` is the C-ordered content, as a flat view of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Of the content, also where it is only described."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Snapshot:
    """`trees` maps each object to its JSON tree; its tensors are named `<object>/<path>`."""

    id: str
    step: int
    rank: int
    world_size: int
    lineage: tuple[str, ...]
    """Ids of the checkpoints this state descends from, newest first."""
    created: float
    versions: Mapping[str, str]
    model: Structure | None
    trees: Mapping[str, Json]
    tensors: Sequence[TensorBytes] = field(repr=False)
    rng: bool
    data: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    origin: Origin | None = None
    parameters: Parameters | None = None

    @property
    def nbytes(self) -> int:
        return sum(len(tensor.data) for tensor in self.tensors)


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin in a slot, and where the description does."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def describe(snapshot: Snapshot) -> bytes:
    """Everything but the bytes of the tensors, which lie in a slot by `layout`."""
    return assembled(
        {f.name: getattr(snapshot, f.name) for f in fields(snapshot)},
        {name: (compact(tree),) for name, tree in snapshot.trees.items()},
        [row_text(t.name, t.dtype, t.shape) for t in snapshot.tensors],
    )


def row_text(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What a description says of one tensor."""
    return compact([name, dtype, shape])


def assembled(
    members: Mapping[str, Any], trees: Mapping[str, Sequence[bytes]], rows: Iterable[bytes]
) -> bytes:
    """A description whose largest members are text already: they are the same in most saves.

    They are joined once: a copy of the text of 40,000 tensors takes 2 ms.
    """
    model: Structure | None = members["model"]
    origin: Origin | None = members["origin"]
    parameters: Parameters | None = members["parameters"]
    entries = ((b"%b:" % compact(name), *text) for name, text in trees.items())
    texts: dict[str, Sequence[bytes]] = {
        "parameters": (parameters.text if parameters else b"null",),
        "model": (model.text if model else b"null",),
        "origin": (compact(origin.to_json() if origin else None),),
        "trees": (b"{", *chain.from_iterable(_separated(entries)), b"}"),
        "tensors": (b"[", b",".join(rows), b"]"),
    }
    found = (
        (b"%b:" % compact(name), *(texts[name] if name in texts else (compact(value),)))
        for name, value in members.items()
    )
    return b"".join((b"{", *chain.from_iterable(_separated(found)), b"}"))


def _separated(pieces: Iterable[Sequence[bytes]]) -> Iterator[Sequence[bytes]]:
    """With a comma before each but the first."""
    for index, each in enumerate(pieces):
        yield (b",", *each) if index else each


def from_slot(description: bytes, slot: memoryview) -> Snapshot:
    """The snapshot in `slot`; its tensors are views of the slot. Trusts what `describe` wrote."""
    members = json.loads(description)
    sizes = [DTYPE_BYTES[dtype] * math.prod(shape) for _, dtype, shape in members["tensors"]]
    offsets, _ = layout(sizes)
    tensors = [
        TensorBytes(name, dtype, tuple(shape), slot[offset : offset + size])
        for (name, dtype, shape), offset, size in zip(
            members["tensors"], offsets, sizes, strict=True
        )
    ]
    found, known = members["origin"], members["parameters"]
    read = {
        "tensors": tensors,
        "model": Structure.from_json(members["model"]) if members["model"] else None,
        "lineage": tuple(members["lineage"]),
        "parameters": Parameters.from_json(known) if known else None,
        "origin": Origin(**{**found, "args": tuple(found["args"])}) if found else None,
    }
    return Snapshot(**{**members, **read})
