"""A checkpoint as whole tensors and one JSON document, for other tools, and as snapshots again.

What ranks hold together (DTensors, what DCP has saved) is put together; what all ranks hold alike
is there once. Everything else is there once per rank, under a key that begins `rank0/`. The
document says the rest, so that the same checkpoint can be made of it again, byte by byte. All
tensors are in host memory at once. Imports torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.format.document import Json, digest, digest_of_digests
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.parameters import Parameters
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.format.tables import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    Tensor,
    object_digest,
    object_of,
)
from autoglm_resume.checkpoint.state import decoding, tree
from autoglm_resume.checkpoint.state.sharding import Box
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat, UsageError

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """`tensors` by key; `document` says which rank has what of which."""

    document: dict[str, Json]
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def raw(self) -> int:
        """Bytes of all tensors of all ranks."""
        sizes = {key: DTYPE_BYTES[dtype] for key, (dtype, _) in self.document["tensors"].items()}
        rows = (row for rank in self.document["ranks"] for row in rank["tensors"])
        return sum(sizes[row["key"]] * math.prod(row["shape"]) for row in rows)

    @property
    def step(self) -> int:
        """That it was exported at. Raises CorruptCheckpoint, and NewerFormat."""
        with self._as_written():
            if type(step := self.document["step"]) is not int:
                raise TypeError(f"step {step!r}")
            return step

    def snapshots(self, id: str, progress: verify.Progress | None = None) -> list[Snapshot]:
        """Of all ranks, as checkpoint `id`, every tensor with the digest that it was exported with.

        `progress` gets their bytes. Raises CorruptCheckpoint, and NewerFormat.
        """
        with self._as_written():
            _require_pieces(self.document)
            read = _Pieces(self)
            ranks = range(len(self.document["ranks"]))
            return [_snapshot(read, self.document, id, rank, progress) for rank in ranks]

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Whatever an untrusted document makes fail, as one error."""
        try:
            found = self.document["format"]
            if found != FORMAT:
                raise NewerFormat(f"expected an export of format {FORMAT}, found {found}")
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(
                f"export: its document is not as written ({error!r})"
            ) from error


def nested(bundle: Bundle) -> dict[str, Any]:
    """The states as scripts know them: by object, or by `rank0` and object where ranks differ.

    Of a checkpoint that was saved through DCP a flat dict, in which `bytes` is what DCP's planner
    has pickled.
    """
    document = bundle.document
    if document["dcp"]:
        return {
            fqn: _content(bundle, row, offset)
            for rank in document["ranks"]
            for (fqn, offset, _), row in zip(rank["state"]["state"], rank["tensors"], strict=True)
        }
    ranks = document["ranks"]
    found: dict[str, Any] = {}
    for name in {name: None for rank in ranks for name in rank["objects"]}:
        holders = [(n, rank) for n, rank in enumerate(ranks) if name in rank["objects"]]
        spellings = [[_unplaced(rank["state"][name]), _keys(rank, name)] for _, rank in holders]
        alike = len(holders) == len(ranks) and all(s == spellings[0] for s in spellings)
        if alike or name in document.get("led", ()):  # which exports of older versions lack
            found[name] = _decoded(bundle, ranks[0], name)
            continue
        for number, rank in holders:
            found.setdefault(f"rank{number}", {})[name] = _decoded(bundle, rank, name)
    return found


def state_of(bundle: Bundle, name: str) -> Any:
    """The state of one object, as the script knows it.

    Raises UsageError if there is no such object, or if ranks have different ones.
    """
    states = nested(bundle)
    if bundle.document["dcp"]:
        begin = f"{name}."
        found = {key[len(begin) :]: v for key, v in states.items() if key.startswith(begin)}
        if found:
            return found
    elif name in states:
        return states[name]
    holders = [rank for rank, held in states.items() if name in held]
    if holders and not bundle.document["dcp"]:
        raise UsageError(
            f"{name}: expected one for all ranks, found another in each of {', '.join(holders)}",
            hint="export all of it, and take from it what you need",
        )
    raise UsageError(f"{name}: no such object in this checkpoint")


def _snapshot(
    read: _Pieces,
    document: dict[str, Json],
    id: str,
    number: int,
    progress: verify.Progress | None,
) -> Snapshot:
    rank = document["ranks"][number]
    parameters = rank.get("parameters")  # which exports of older versions lack
    contents = []
    for row in rank["tensors"]:
        contents.append(read.tensor(row))
        if progress:
            progress(contents[-1].nbytes)
    tables: dict[str, list[Tensor]] = {name: [] for name in rank["objects"]}
    for row, content in zip(rank["tensors"], contents, strict=True):
        entry = Tensor(content.name, content.dtype, content.shape, row["digest"], ())
        tables[object_of(content.name)].append(entry)
    for name, expected in rank["objects"].items():
        found = object_digest(rank["state"][name], tables[name])
        if found != expected:
            raise CorruptCheckpoint(f"export: {name}: expected {expected}, found {found}")
    return Snapshot(
        id=id,
        step=step_of(id),
        rank=number,
        world_size=len(document["ranks"]),
        lineage=(),
        created=time.time(),
        versions=document["versions"],
        model=Structure.from_json(rank["model"], "export") if rank["model"] else None,
        trees=rank["state"],
        tensors=contents,
        rng=rank["rng"],
        data=rank["data"],
        metrics=document["metrics"],
        parameters=Parameters.from_json(parameters, "export") if parameters else None,
    )


class _Pieces:
    """What ranks have of the tensors, verified; pieces that several have are there once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._found: dict[tuple[str, Box], tuple[memoryview, str]] = {}

    def tensor(self, row: Json) -> TensorBytes:
        """That of one row of a rank. Raises CorruptCheckpoint, and what a wrong row makes fail."""
        key, box = row["key"], _box(row)
        if (key, box) not in self._found:
            self._found[key, box] = self._read(key, box)
        data, found = self._found[key, box]
        if found != row["digest"]:
            raise CorruptCheckpoint(
                f"export: {key}: expected {row['digest']} for {row['name']} of a rank, found"
                f" {found}",
                hint="only what autoglm exported, unchanged, can be imported again",
            )
        return TensorBytes(row["name"], self._bundle.document["tensors"][key][0], box.shape, data)

    def _read(self, key: str, box: Box) -> tuple[memoryview, str]:
        """Its bytes, and their digest."""
        dtype, shape = self._bundle.document["tensors"][key]
        whole = self._bundle.tensors[key]
        if [tree.dtype_name(whole.dtype), list(whole.shape)] != [dtype, shape]:
            raise CorruptCheckpoint(
                f"export: {key}: expected {shape} of {dtype}, found {list(whole.shape)} of"
                f" {tree.dtype_name(whole.dtype)}"
            )
        # An expanded tensor has more elements than memory; ours have one place for each.
        if whole.numel() * whole.element_size() > whole.untyped_storage().nbytes():
            raise CorruptCheckpoint(f"export: {key}: expected all of its elements, found fewer")
        local = whole[box.within(Box.whole(tuple(shape)))].contiguous()
        if tuple(local.shape) != box.shape:
            raise CorruptCheckpoint(f"export: {key}: expected {box} in it, found {local.shape}")
        data = tree.as_bytes(local)
        chunks = range(0, len(data), CHUNK_BYTES)
        return data, digest_of_digests(digest(data[at : at + CHUNK_BYTES]) for at in chunks)


def _box(row: Json) -> Box:
    return Box(tuple(row["offset"]), tuple(row["shape"]))


def _require_pieces(document: dict[str, Json]) -> None:
    """Raise ValueError if the ranks are said to have more of a tensor than there is.

    So no document takes more memory than twice what the tensors take.
    """
    pieces: dict[str, set[Box]] = {}
    for rank in document["ranks"]:
        for row in rank["tensors"]:
            pieces.setdefault(row["key"], set()).add(_box(row))
    for key, boxes in pieces.items():
        if sum(box.volume for box in boxes) > math.prod(document["tensors"][key][1]):
            raise ValueError(f"{key}: more than all of it")


def _content(bundle: Bundle, row: Json, offset: Json) -> torch.Tensor | bytes:
    found = bundle.tensors[row["key"]]
    return found if offset is not None else bytes(tree.as_bytes(found))


def _decoded(bundle: Bundle, rank: Json, name: str) -> Any:
    tensors = {
        row["name"]: bundle.tensors[row["key"]]
        for row in rank["tensors"]
        if object_of(row["name"]) == name
    }
    return decoding.decode(rank["state"][name], tensors)


def _keys(rank: Json, name: str) -> list[Json]:
    return [[r["name"], r["key"]] for r in rank["tensors"] if object_of(r["name"]) == name]


def _unplaced(node: Json) -> Json:
    """A state tree without what differs between the shards of one tensor."""
    if isinstance(node, list):
        return [_unplaced(child) for child in node]
    if isinstance(node, dict):
        dropped = ("offset", "strides") if "$dtensor" in node else ()
        return {key: _unplaced(child) for key, child in node.items() if key not in dropped}
    return node
