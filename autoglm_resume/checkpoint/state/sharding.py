"""Tensors that ranks hold together: which box of one each of them has. Imports torch.

A DTensor is saved as the shard that this rank has, and what it is a shard of. Only boxes are
supported: each dimension of the mesh shards one dimension of the tensor, or replicates it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.state.strides import in_order_of
from autoglm_resume.errors import CorruptCheckpoint, ObjectMismatch, UsageError

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins, and its size, in every dimension."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both have, None if that is nothing."""
        begin = tuple(map(max, self.offset, other.offset))
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        end = tuple(min(a + n, b + m) for a, n, b, m in ends)
        found = Box(begin, tuple(max(0, e - b) for b, e in zip(begin, end, strict=True)))
        return found if found.volume else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it is in a tensor that holds `outer`."""
        begins = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(b, b + n) for b, n in zip(begins, self.shape, strict=True))

    def span(self, outer: Box) -> tuple[int, int]:
        """First element of it in the flat, C-ordered `outer`, and one past its last."""
        first = last = 0
        for part, size in zip(self.within(outer), outer.shape, strict=True):
            first = first * size + part.start
            last = last * size + part.stop - 1
        return first, last + 1


@dataclass(frozen=True)
class Sharding:
    """A shard of a tensor of `shape` begins at `offset`.

    `mesh` is the shape of the mesh, and `names` those of its dimensions; `placements` says what
    each of them does: `S0` shards dimension 0 of the tensor, `R` replicates.
    """

    shape: Shape
    offset: Shape
    mesh: Shape
    names: tuple[str, ...] | None
    placements: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        """Members of a leaf (see tree.py)."""
        return {
            "shape": list(self.shape),
            "offset": list(self.offset),
            "mesh": {
                "shape": list(self.mesh),
                "names": None if self.names is None else list(self.names),
            },
            "placements": list(self.placements),
        }

    @classmethod
    def from_json(cls, leaf: Mapping[str, Json]) -> Sharding:
        """Raises CorruptCheckpoint when these are not what `to_json` made."""
        try:
            mesh, names = leaf["mesh"]["shape"], leaf["mesh"]["names"]
            found = cls(
                tuple(map(int, leaf["shape"])),
                tuple(map(int, leaf["offset"])),
                tuple(map(int, mesh)),
                None if names is None else tuple(map(str, names)),
                tuple(map(str, leaf["placements"])),
            )
            if len(found.shape) != len(found.offset) or len(found.mesh) != len(found.placements):
                raise ValueError("different numbers of dimensions")
        except (LookupError, TypeError, ValueError) as error:
            raise CorruptCheckpoint(f"sharding of a tensor: not as written ({error!r})") from error
        return found


def sharding_of(tensor: Any, where: str) -> Sharding:
    """Of a DTensor. Raises UsageError naming `where` if its shard is not a box that is known."""

    def refuse(found: str) -> UsageError:
        return UsageError(
            f"{where}: a DTensor {found} cannot be saved: only Shard and Replicate can",
            hint="redistribute() it first, or leave it out of what is tracked",
        )

    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise refuse(f"on {mesh}, of which this rank is no part,")
    sharding, expected = _planned(
        tuple(tensor.shape), mesh, tuple(coordinate), tuple(tensor.placements)
    )
    if "" in sharding.placements:
        raise refuse(f"with placements {tensor.placements}")
    found = tuple(tensor._local_tensor.shape)
    if expected != found:
        raise refuse(f"whose shard is of {found} where torch would make it {expected}")
    return sharding


@functools.lru_cache(maxsize=1 << 16)  # torch takes 0.1 ms for each, and there are thousands
def _planned(
    shape: Shape, mesh: Any, coordinate: Shape, placements: tuple[Any, ...]
) -> tuple[Sharding, Shape]:
    """For the rank at `coordinate`, which is not part of what makes meshes equal."""
    box = Arrangement(mesh, placements).box(shape)
    texts = tuple(map(_text, placements))
    return Sharding(shape, box.offset, tuple(mesh.shape), mesh.mesh_dim_names, texts), box.shape


@dataclass(frozen=True)
class Arrangement:
    """How a tensor is spread over ranks that are there now."""

    mesh: Any
    placements: Sequence[Any]

    def box(self, shape: Shape) -> Box:
        """This rank's part of a tensor of `shape`."""
        from torch.distributed.tensor import _utils

        local, offset = _utils.compute_local_shape_and_global_offset(
            shape, self.mesh, self.placements
        )
        return Box(tuple(offset), tuple(local))

    def wrap(self, local: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The DTensor of `shape` whose shard here is `local`, with its order in memory."""
        from torch.distributed.tensor import DTensor

        found: torch.Tensor = DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=in_order_of(local.stride(), shape),
        )
        return found


class Present:
    """The tensors there are now, from which follows how those of a checkpoint are to be spread.

    Of modules by their names, of optimizers by the parameter they belong to. Any other DTensor
    goes where it was on the mesh whose dimensions have the same names.
    """

    def __init__(
        self, objects: Mapping[str, Any], renamed: Callable[[str], str] = lambda name: name
    ) -> None:
        """`objects` are modules, optimizers and others; `renamed` gives tensors present names."""
        self._renamed = renamed
        self._tensors = dict(_tensors(objects))
        meshes = [t.device_mesh for t in self._tensors.values() if is_sharded(t)]
        self._meshes = list({id(mesh): mesh for mesh in meshes}.values())

    def arranged(self, name: str, shape: Shape, sharding: Sharding | None) -> Arrangement | None:
        """How tensor `name` of a checkpoint is to be spread; None if every rank has all of it.

        `sharding` is how it was. Raises ObjectMismatch if that cannot be known.
        """
        # The last one is for the state of an optimizer.
        names = (name, self._renamed(name), name.rpartition(".")[0])
        now = next((self._tensors[each] for each in names if each in self._tensors), None)
        if now is not None and tuple(now.shape) == shape:
            return Arrangement(now.device_mesh, now.placements) if is_sharded(now) else None
        if sharding is None:
            return None
        return self._by_mesh(name, sharding)

    def _by_mesh(self, name: str, sharding: Sharding) -> Arrangement:
        from torch.distributed.tensor import Replicate, Shard

        for mesh in sorted(self._meshes, key=lambda mesh: tuple(mesh.shape) != sharding.mesh):
            if mesh.ndim == len(sharding.mesh) and mesh.mesh_dim_names == sharding.names:
                placements = [
                    Replicate() if text == "R" else Shard(int(text[1:]))
                    for text in sharding.placements
                ]
                return Arrangement(mesh, placements)
        there = ", ".join(str(mesh) for mesh in self._meshes) or "no tensor that is sharded at all"
        raise ObjectMismatch(
            f"{name}: expected a mesh of {len(sharding.mesh)} dimensions ({sharding.names}), over"
            f" which it was sharded, found {there}",
            hint="shard the model as it was when the checkpoint was made, before session.resume()",
        )


def is_sharded(value: object) -> bool:
    """Whether `value` is a DTensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "_local_tensor")


def _tensors(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, obj in objects.items():
        if isinstance(obj, torch.nn.Module):
            for key, value in obj.state_dict().items():
                if isinstance(value, torch.Tensor):
                    yield f"{name}/{key}", value
        elif isinstance(obj, torch.optim.Optimizer):
            parameters = (p for group in obj.param_groups for p in group["params"])
            for number, parameter in enumerate(parameters):
                yield f"{name}/state.{number}", parameter


def _text(placement: Any) -> str:
    """`S0`, `R`; empty where what a rank has is no box of the tensor."""
    from torch.distributed.tensor import Replicate, Shard

    if type(placement) is Shard:
        return f"S{placement.dim}"
    return "R" if type(placement) is Replicate else ""
