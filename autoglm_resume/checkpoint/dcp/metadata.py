"""DCP's metadata as JSON, so that a checkpoint made through DCP is read without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.state import decoding, tree
from autoglm_resume.errors import CorruptCheckpoint, UsageError

Key: TypeAlias = "tuple[str, tuple[int, ...] | None]"
"""What is stored as one piece: the name in the flat state dict, and where in the whole tensor the
piece begins (None for what is no tensor)."""

_MEMORY_FORMATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}


def key_of(index: MetadataIndex) -> Key:
    """The hint in `index.index` says nothing of the piece."""
    return index.fqn, None if index.offset is None else tuple(index.offset)


def to_json(metadata: Metadata, homes: Mapping[Key, int]) -> Json:
    """`homes` says which rank stores each piece.

    Raises UsageError when a piece was planned that no rank has written, and when a planner of the
    script's own left data that only pickle could save.
    """

    def home(fqn: str, offsets: tuple[int, ...] | None) -> int:
        if (fqn, offsets) not in homes:
            raise UsageError(f"{fqn}: expected every rank to write its plan, found it unwritten")
        return homes[fqn, offsets]

    def entry(fqn: str, found: TensorStorageMetadata | BytesStorageMetadata) -> Json:
        if isinstance(found, BytesStorageMetadata):
            return {"rank": home(fqn, None)}
        properties = found.properties
        return {
            "dtype": tree.dtype_name(properties.dtype),
            "size": list(found.size),
            "requires_grad": properties.requires_grad,
            "memory_format": str(properties.memory_format).removeprefix("torch."),
            "pin_memory": properties.pin_memory,
            "chunks": [
                [list(c.offsets), list(c.sizes), home(fqn, tuple(c.offsets))] for c in found.chunks
            ],
        }

    planner_data, tensors = tree.encode(metadata.planner_data, "planner_data")
    if tensors:
        raise UsageError(f"{tensors[0][0]}: a tensor cannot be saved in a planner's data")
    return {
        "version": metadata.version,
        "entries": [[fqn, entry(fqn, e)] for fqn, e in metadata.state_dict_metadata.items()],
        "planner_data": planner_data,
    }


def from_json(document: Json, file: str) -> Metadata:
    """The metadata, with the homes of all pieces in its `storage_data`.

    Raises CorruptCheckpoint naming `file`.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    homes: dict[Key, int] = {}
    try:
        for fqn, found in document["entries"]:
            if "dtype" not in found:
                entries[fqn] = BytesStorageMetadata()
                homes[fqn, None] = found["rank"]
                continue
            chunks = []
            for offsets, sizes, rank in found["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                homes[fqn, tuple(offsets)] = rank
            entries[fqn] = TensorStorageMetadata(_properties(found), _size(found["size"]), chunks)
        planner_data = decoding.decode(document["planner_data"], {})
        return Metadata(entries, planner_data, homes, version=document["version"])
    except (LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{file}: DCP metadata not as it was written ({error!r})") from None


def _properties(found: Mapping[str, Any]) -> TensorProperties:
    return TensorProperties(
        dtype=tree.dtype_named(found["dtype"]),
        requires_grad=bool(found["requires_grad"]),
        memory_format=_MEMORY_FORMATS[found["memory_format"]],
        pin_memory=bool(found["pin_memory"]),
    )


def _size(sizes: list[int]) -> torch.Size:
    return torch.Size(sizes)
