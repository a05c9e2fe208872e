"""How tensors lie in memory: in which order, with which gaps, and what of it they share.

Their bytes are stored in C order, whatever the order in memory; the leaf of a tree (see tree.py)
says the rest, in members that are there only where they are needed:

    "strides": [27, 1, 9, 3]     in elements, if they are not those of C order
    "memory": ["x/a", 64]        begins 64 bytes into memory that it shares with tensor `x/a`
    "conj": true, "neg": true    a view whose elements are conjugated or negated as they are read
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.state.sharding import is_sharded
from autoglm_resume.checkpoint.state.strides import extent, in_c_order, in_order_of
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

Leaf: TypeAlias = "Mapping[str, Json]"
_Place: TypeAlias = "tuple[int, int, int, int]"
"""Number of the device, addresses of begin and end, and which tensor it is."""

_ALIGNED = 16
"""Bytes: the size of the largest element."""


_MEMBERS = ("strides", "memory", "conj", "neg")


def without(leaf: Leaf) -> dict[str, Json]:
    """What a leaf says of a tensor alone, wherever it lies."""
    return {key: value for key, value in leaf.items() if key not in (*_MEMBERS, "same")}


def described(tensor: torch.Tensor) -> dict[str, Json]:
    """Members of the leaf of a tensor, but for what it shares."""
    found: dict[str, Json] = {}
    if (strides := tensor.stride()) != in_c_order(tensor.shape):
        found["strides"] = list(strides)
    if tensor.is_conj():
        found["conj"] = True
    if tensor.is_neg():
        found["neg"] = True
    return found


def shared(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Json]:
    """The member `memory` of those tensors that overlap with others, by name."""
    places = sorted(
        (tensor.get_device(), begin, begin + _span(tensor), nth)
        for nth, (_, tensor) in enumerate(tensors)
        if (begin := tensor.data_ptr())
    )
    found: dict[str, Json] = {}
    group: list[_Place] = []
    device, end = None, 0
    for place in places:
        if place[0] != device or place[1] >= end:
            found.update(_members(group, tensors))
            group, device, end = [], place[0], place[2]
        group.append(place)
        end = max(end, place[2])
    return found | _members(group, tensors)


def _members(
    group: Sequence[_Place], tensors: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, Json]:
    if len(group) < 2:
        return {}
    base = group[0][1] // _ALIGNED * _ALIGNED
    first = tensors[min(nth for *_, nth in group)][0]
    return {tensors[nth][0]: [first, begin - base] for _, begin, _, nth in group}


def lay_out(leaves: Iterable[tuple[str, Leaf]], tensors: dict[str, torch.Tensor]) -> None:
    """Have `tensors`, which are in C order, lie as their leaves say; DTensors stay as they are.

    Raises CheckpointError where memory is short, and ValueError or the like for what `described`
    and `shared` never say.
    """
    found = [
        (name, leaf)
        for name, leaf in leaves
        if not leaf.keys().isdisjoint(_MEMBERS)
        and name in tensors
        and not is_sharded(tensors[name])
    ]
    memories = _memories(found, tensors)
    for name, leaf in found:
        tensor = tensors[name]
        # What a tensor reads as is stored; this is what lies in memory.
        if leaf.get("conj"):
            tensor = tensor.conj_physical()
        if leaf.get("neg"):
            tensor = tensor.neg()
        tensor = _placed(name, tensor, leaf, memories)
        if leaf.get("conj"):
            tensor = tensor.conj()
        if leaf.get("neg"):
            tensor = torch._neg_view(tensor)
        tensors[name] = tensor


def _memories(
    leaves: Iterable[tuple[str, Leaf]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What several tensors lie in, as bytes, by the name that their leaves give it."""
    ends: dict[str, int] = {}
    for name, leaf in leaves:
        if "memory" in leaf:
            group, offset = leaf["memory"]
            tensor = tensors[name]
            end = offset + extent(tensor.shape, _strides(tensor, leaf)) * tensor.element_size()
            ends[group] = max(end, ends.get(group, 0))
    device = {leaf["memory"][0]: tensors[name].device for name, leaf in leaves if "memory" in leaf}
    return {group: _zeros(group, end, device[group]) for group, end in ends.items()}


def _placed(
    name: str, tensor: torch.Tensor, leaf: Leaf, memories: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    strides = _strides(tensor, leaf)
    if "memory" in leaf:
        group, offset = leaf["memory"]
        memory = memories[group]
    elif strides == tensor.stride():
        return tensor
    else:
        size = extent(tensor.shape, strides) * tensor.element_size()
        memory, offset = _zeros(name, size, tensor.device), 0
    first, rest = divmod(offset, tensor.element_size())
    if rest or first < 0:
        raise ValueError(f"{name}: begins at byte {offset}")
    found = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    found.set_(memory.untyped_storage(), first, tensor.shape, strides)
    # What is expanded has all of a dimension in the same place: it is written once.
    once, source = found, tensor
    for dimension, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dimension]:
            once, source = once.narrow(dimension, 0, 1), source.narrow(dimension, 0, 1)
    once.copy_(source)
    return found


def _strides(tensor: torch.Tensor, leaf: Leaf) -> tuple[int, ...]:
    """As the leaf says, for a tensor in C order. Of a DTensor's leaf only the order counts: which
    part of it this is may be another one now.
    """
    if "strides" not in leaf:
        return in_c_order(tensor.shape)
    strides = leaf["strides"]
    if len(strides) != tensor.dim() or not all(type(s) is int and s >= 0 for s in strides):
        raise ValueError(f"strides {strides} of {list(tensor.shape)}")
    return tuple(strides) if "$tensor" in leaf else in_order_of(strides, tensor.shape)


def ordered(name: str, tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    """Tensor `name`, which is in C order, without gaps in the order that its leaf says.

    Raises CorruptCheckpoint.
    """
    try:
        strides = _strides(tensor, {**leaf, "$tensor": None}) if "strides" in leaf else None
    except (TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{name}: its leaf is not as written ({error!r})") from error
    if strides is None:
        return tensor
    strides = in_order_of(strides, tensor.shape)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _span(tensor: torch.Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    return extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _zeros(name: str, size: int, device: torch.device) -> torch.Tensor:
    """Bytes; what lies in the gaps between elements is nobody's, and the same every time."""
    try:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: no memory for it: {error}") from error
