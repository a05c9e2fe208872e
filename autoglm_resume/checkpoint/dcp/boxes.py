"""Which chunks hold what DCP wants to read: boxes of the pieces that ranks have stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from autoglm_resume.checkpoint.dcp.metadata import Key, key_of
from autoglm_resume.checkpoint.format.part import Part, part_file
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk, Tensor
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.checkpoint.state.sharding import Box
from autoglm_resume.errors import CorruptCheckpoint, UsageError

STATE = "state"
"""The object that holds the pieces of a rank."""

Wanted: TypeAlias = "tuple[Key, torch.Size, torch.Size]"
"""A piece, and offsets and sizes of a box of it."""


@dataclass(frozen=True)
class Load:
    """`chunk` of `part` goes to `target`; it belongs to tensor `name`."""

    part: Part
    chunk: Chunk
    target: memoryview
    name: str


def wanted_of(item: ReadItem) -> Wanted:
    """What of it is in storage."""
    return key_of(item.storage_index), item.storage_offsets, item.lengths


def pieces_of(part: Part) -> dict[Key, Tensor]:
    """Its tensors by what they are pieces of. Raises CorruptCheckpoint."""
    tensors = {tensor.name: tensor for tensor in part.tensors}
    try:
        return {
            (fqn, None if offset is None else tuple(offset)): tensors[leaf["$tensor"]]
            for fqn, offset, leaf in part.state[STATE]
        }
    except (LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{part.id}/{part_file(part.rank)}: pieces not as they were written ({error!r})"
        ) from None


def loads_of(
    part: Part, tensor: Tensor, items: Sequence[ReadItem], loads: list[Load]
) -> Iterator[tuple[Wanted, torch.Tensor]]:
    """What `items` want of `tensor`, as views of one fresh buffer; `loads` that fill it are added.

    Only the chunks are read that hold something of a box: of few rows of a large tensor, few.
    Raises UsageError when a box is not within the tensor.
    """
    dtype = tree.dtype_named(tensor.dtype)
    spans = [_span(tensor, item, dtype.itemsize) for item in items]
    start = min(first for first, _ in spans) // CHUNK_BYTES * CHUNK_BYTES
    stop = min(tensor.nbytes, -(-max(end for _, end in spans) // CHUNK_BYTES) * CHUNK_BYTES)
    buffer = torch.empty(max(0, stop - start), dtype=torch.uint8)
    view = tree.as_bytes(buffer)
    for index in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
        chunk = part.chunks[tensor.chunks[index]]
        at = index * CHUNK_BYTES - start
        loads.append(Load(part, chunk, view[at : at + chunk.raw], tensor.name))
    flat, strides = buffer.view(dtype), torch.empty(tensor.shape, device="meta").stride()
    for item, (first, _) in zip(items, spans, strict=True):
        if item.type == LoadItemType.BYTE_IO:
            yield wanted_of(item), buffer
        else:
            begin = (first - start) // dtype.itemsize
            yield wanted_of(item), flat.as_strided(item.lengths, strides, begin)


def _span(tensor: Tensor, item: ReadItem, item_bytes: int) -> tuple[int, int]:
    """First byte of what `item` wants, and one past its last."""
    if item.type == LoadItemType.BYTE_IO:
        return 0, tensor.nbytes
    if 0 in item.lengths:
        return 0, 0
    box, whole = Box(item.storage_offsets, item.lengths), Box.whole(tensor.shape)
    if len(box.shape) != len(whole.shape) or box.overlap(whole) != box:
        raise UsageError(f"{tensor.name}: expected a box of {list(tensor.shape)}, found {item}")
    first, end = box.span(whole)
    return first * item_bytes, end * item_bytes
