"""The state of a script's objects, on its way into a snapshot. Imports torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state import tree

_NOTHING = memoryview(b"")


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
    versions: Mapping[str, str] | None = None
    created: float | None = None


@dataclass(frozen=True)
class CapturedState:
    """`trees` of all objects, and their tensors, untouched, by name."""

    trees: Mapping[str, Json]
    tensors: Sequence[tuple[str, torch.Tensor]] = field(repr=False)

    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [tensor.numel() * tensor.element_size() for _, tensor in self.tensors]

    def snapshot(self, identity: Identity, data: Sequence[memoryview] | None = None) -> Snapshot:
        """A snapshot whose tensors have their content in `data`; without it, only described."""
        return Snapshot(
            id=identity.id,
            step=step_of(identity.id),
            rank=identity.rank,
            world_size=identity.world_size,
            lineage=identity.lineage,
            created=time.time() if identity.created is None else identity.created,
            versions=torch_versions() if identity.versions is None else identity.versions,
            model=identity.model,
            trees=self.trees,
            tensors=[
                TensorBytes(name, tree.dtype_name(tensor.dtype), tuple(tensor.shape), view)
                for (name, tensor), view in zip(
                    self.tensors, data or [_NOTHING] * len(self.tensors), strict=True
                )
            ],
            rng=identity.rng,
            data=identity.data,
            metrics=identity.metrics,
        )

    def in_place(self, identity: Identity) -> Snapshot:
        """A snapshot without a copy: good until the next optimizer step, as are host tensors."""
        hosts = [tensor.resolve_conj().resolve_neg().cpu() for _, tensor in self.tensors]
        return self.snapshot(identity, [tree.as_bytes(host.contiguous()) for host in hosts])


def gather(objects: Mapping[str, object]) -> CapturedState:
    """State of `objects` (name to state dict).

    Raises UsageError naming the path of a value that cannot be saved.
    """
    trees: dict[str, Json] = {}
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, state in objects.items():
        trees[name], leaves = tree.encode(state, name)
        tensors += leaves
    return CapturedState(trees, tensors)


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
