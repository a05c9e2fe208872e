"""The state of a script's objects, on its way into a snapshot. Imports torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from autoglm_resume.checkpoint.format.document import Json, compact
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.format.parameters import Parameters
from autoglm_resume.checkpoint.format.snapshot import (
    Snapshot,
    TensorBytes,
    assembled,
    layout,
    row_text,
)
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state import tree


@dataclass(frozen=True)
class Identity:
    """What a snapshot says of itself."""

    id: str
    rank: int
    world_size: int
    lineage: tuple[str, ...] = ()
    model: Structure | None = None
    rng: bool = False
    data: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: Parameters | None = None
    versions: Mapping[str, str] | None = None
    created: float | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class TensorTable:
    """Tensors by name, untouched, and what is derived from their names, types and shapes.

    A state whose tensors stay the same has the very same table, save after save: describing 849
    tensors anew held training up for 6 to 9 ms.
    """

    tensors: Sequence[tuple[str, torch.Tensor]] = field(repr=False)
    until_step: Sequence[bool] = field(default=(), repr=False)
    """Of each, whether only an optimizer's step changes it; all may be left out."""

    @cached_property
    def rows(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of each tensor."""
        return [(n, tree.dtype_name(t.dtype), tuple(t.shape)) for n, t in self.tensors]

    @cached_property
    def text(self) -> bytes:
        """The rows as JSON, with commas between them."""
        return b",".join(row_text(*row) for row in self.rows)

    @property
    def offsets(self) -> list[int]:
        """Where the tensors begin in the memory that they take together."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Bytes that the tensors take in a slot."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[list[int], int]:
        return layout(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)


@dataclass(frozen=True)
class ObjectState:
    """One object's tree, its tensors, and the tree as JSON, in pieces."""

    tree: Json
    table: TensorTable
    text: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class CapturedState:
    """The state of all objects, by name; their tensors lie in a slot in this order."""

    objects: Mapping[str, ObjectState]

    @property
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Of all objects."""
        return [each for state in self.objects.values() for each in state.table.tensors]

    @property
    def size(self) -> int:
        """Bytes that all tensors take in a slot."""
        return sum(state.table.size for state in self.objects.values())

    def describe(self, identity: Identity) -> bytes:
        """What `snapshot.describe` says of its snapshot, without making one."""
        states = self.objects.values()
        return assembled(
            {f.name: None for f in fields(Snapshot)} | _members(identity),
            {name: state.text for name, state in self.objects.items()},
            [state.table.text for state in states if state.table.tensors],
        )

    def in_place(self, identity: Identity) -> Snapshot:
        """A snapshot without a copy: good until the next optimizer step, as are host tensors."""
        tensors = []
        for state in self.objects.values():
            for row, (_, tensor) in zip(state.table.rows, state.table.tensors, strict=True):
                host = tensor.resolve_conj().resolve_neg().cpu().contiguous()
                tensors.append(TensorBytes(*row, tree.as_bytes(host)))
        trees = {name: state.tree for name, state in self.objects.items()}
        return Snapshot(**_members(identity), trees=trees, tensors=tensors)


def _members(identity: Identity) -> dict[str, Any]:
    """What a snapshot says of itself."""
    return {
        "id": identity.id,
        "step": step_of(identity.id),
        "rank": identity.rank,
        "world_size": identity.world_size,
        "lineage": identity.lineage,
        "created": time.time() if identity.created is None else identity.created,
        "versions": torch_versions() if identity.versions is None else identity.versions,
        "model": identity.model,
        "rng": identity.rng,
        "data": identity.data,
        "metrics": identity.metrics,
        "origin": identity.origin,
        "parameters": identity.parameters,
    }


def state_of(name: str, value: object) -> ObjectState:
    """Of one state dict. Raises UsageError naming the path of a value that cannot be saved."""
    found, tensors = tree.encode(value, name)
    return ObjectState(found, TensorTable(tensors), (compact(found),))


def gather(objects: Mapping[str, object]) -> CapturedState:
    """State of `objects` (name to state dict).

    Raises UsageError naming the path of a value that cannot be saved.
    """
    return CapturedState({name: state_of(name, value) for name, value in objects.items()})


def take(objects: Mapping[str, object], **identity: Any) -> Snapshot:
    """A snapshot without shared memory: tensors in host memory are not copied, so it is only good
    until the next optimizer step. `identity` is that of `Identity`.

    Raises UsageError naming the path of a value that cannot be saved.
    """
    return gather(objects).in_place(Identity(**identity))


def structure_of(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, str] | None = None
) -> Structure:
    """Structure of a model from its `state_dict()`; other values in it are left out.

    `config` maps the paths of the job's declared config files to their digests.
    """
    return Structure.of(
        (
            (name, tree.dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        ),
        config,
    )


def torch_versions() -> dict[str, str]:
    """Of what decides whether a restored run repeats bit by bit."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
