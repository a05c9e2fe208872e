"""A rank's state at one step, as bytes: all that persisting it needs.

For now the buffers of tensors in host memory are the tensors' own memory, so a snapshot is only
good until the next optimizer step; device tensors are copied.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autoglm_resume.checkpoint import tree
from autoglm_resume.checkpoint.document import Json
from autoglm_resume.checkpoint.part import parse_id
from autoglm_resume.checkpoint.structure import Structure


@dataclass(frozen=True)
class TensorBytes:
    """`data` is the C-ordered content, as a flat view of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class Snapshot:
    """`trees` maps each object to its JSON tree; its tensors are named `<object>/<path>`."""

    id: str
    step: int
    rank: int
    world_size: int
    lineage: tuple[str, ...]
    created: float
    versions: Mapping[str, str]
    model: Structure | None
    trees: Mapping[str, Json]
    tensors: Sequence[TensorBytes] = field(repr=False)
    rng: bool
    data: bool

    @property
    def nbytes(self) -> int:
        return sum(len(tensor.data) for tensor in self.tensors)


def take(
    objects: Mapping[str, object],
    *,
    id: str,
    rank: int,
    world_size: int,
    lineage: Sequence[str] = (),
    model: Structure | None = None,
    rng: bool = False,
    data: bool = False,
    versions: Mapping[str, str] | None = None,
    created: float | None = None,
) -> Snapshot:
    """Snapshot of `objects` (name to state dict), as checkpoint `id` (see `checkpoint_id`).

    `lineage` holds the ids of the checkpoints this state descends from, newest first.
    Raises UsageError naming the path of a value that cannot be saved.
    """
    parsed = parse_id(id)
    if parsed is None:
        raise ValueError(f"{id!r} is not a checkpoint id")
    trees: dict[str, Json] = {}
    tensors: list[TensorBytes] = []
    for name, state in objects.items():
        trees[name], leaves = tree.encode(state, name)
        tensors += [_bytes_of(leaf, tensor) for leaf, tensor in leaves]
    return Snapshot(
        id=id,
        step=parsed[0],
        rank=rank,
        world_size=world_size,
        lineage=tuple(lineage),
        created=time.time() if created is None else created,
        versions=torch_versions() if versions is None else versions,
        model=model,
        trees=trees,
        tensors=tensors,
        rng=rng,
        data=data,
    )


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


def _bytes_of(name: str, tensor: torch.Tensor) -> TensorBytes:
    host = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return TensorBytes(
        name=name,
        dtype=tree.dtype_name(host.dtype),
        shape=tuple(host.shape),
        data=tree.as_bytes(host),
    )
