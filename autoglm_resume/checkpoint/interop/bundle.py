"""A checkpoint as whole tensors and one JSON document, for other tools, and back. Imports torch.

What ranks hold together (DTensors, what DCP has saved) is put together again; what all ranks hold
alike is there once. Everything else is there once per rank, under a key that begins `rank0/`. The
document says the rest, so that the same checkpoint can be made of it again, byte by byte. All
tensors are in host memory at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.document import Json, digest, digest_of_digests
from autoglm_resume.checkpoint.format.ids import checkpoint_id, step_of
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.format.tables import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    Tensor,
    object_digest,
    object_of,
)
from autoglm_resume.checkpoint.state import restore, tree
from autoglm_resume.checkpoint.state.sharding import Box, Shape
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat, UsageError

FORMAT = 1
TOKEN = "imported"


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


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a part: `box` of the tensor `name`, which has `shape`.

    `joint`: other boxes of it are with other ranks.
    """

    part: Part
    tensor: Tensor
    name: str
    shape: Shape
    box: Box
    joint: bool


@dataclass(frozen=True)
class _Entry:
    """A tensor to export, and where its boxes are read."""

    key: str
    dtype: str
    shape: Shape
    sources: Sequence[_Leaf]
    leaves: Sequence[_Leaf]
    """All leaves that it brings back."""


def gather(store: Store, path: Path, progress: verify.Progress | None = None) -> Bundle:
    """The checkpoint in `path`, every byte verified; `progress` gets bytes of tensors.

    Raises CheckpointError.
    """
    manifest = store.load_manifest(path)
    parts = [store.load_part(path, ref.rank) for ref in manifest.parts]
    entries = list(_entries(parts))
    tensors: dict[str, torch.Tensor] = {}
    with ChunkReader(path, parts) as reader:

        def load(index: int, _: memoryview) -> None:
            tensors[entries[index].key] = _load(reader, entries[index], progress)

        verify.on_threads(len(entries), load, lambda: memoryview(b""))
    return Bundle(_document(manifest, parts, entries), {e.key: tensors[e.key] for e in entries})


def put(
    store: Store,
    exchange: Bundle,
    step: int | None = None,
    progress: verify.Progress | None = None,
) -> Manifest:
    """Commit it as a new checkpoint of `store`, of `step` or the step it was exported at.

    `progress` gets the bytes of all tensors of all ranks twice: verified, and written.
    Raises UsageError when that is there already, and CorruptCheckpoint, before anything is
    written, when a tensor is not what was exported.
    """
    try:
        document = exchange.document
        if document["format"] != FORMAT:
            raise NewerFormat(f"expected an export of format {FORMAT}, found {document['format']}")
        id = checkpoint_id(document["step"] if step is None else step, TOKEN)
        snapshots = [
            _snapshot(exchange, id, rank, progress) for rank in range(len(document["ranks"]))
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint(f"export: its document is not as written ({error!r})") from error
    directory = store.directory(id)
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory}: there already", hint="import it as another --step")
    with suppress(FileNotFoundError):
        store.delete(id)  # left by an import that died
    abandoned = Event()

    def persist(snapshot: Snapshot) -> None:
        try:
            PartWriter(store).persist(snapshot, abandoned)
            if progress:
                progress(snapshot.nbytes)
        except BaseException:
            abandoned.set()
            raise

    try:
        # At once, because what ranks hold alike is shared out among them.
        with ThreadPoolExecutor(len(snapshots)) as pool:
            list(pool.map(persist, snapshots))
        return store.load_manifest(directory)
    except BaseException:
        if directory.exists() and not (directory / MANIFEST).exists():
            store.delete(id)
        raise


def nested(exchange: Bundle) -> dict[str, Any]:
    """The states as scripts know them: by object, or by `rank0` and object where ranks differ.

    Of a checkpoint that was saved through DCP a flat dict, in which `bytes` is what DCP's planner
    has pickled.
    """
    document = exchange.document
    if document["dcp"]:
        return {
            fqn: _content(exchange, row, offset)
            for rank in document["ranks"]
            for (fqn, offset, _), row in zip(rank["state"]["state"], rank["tensors"], strict=True)
        }
    ranks = document["ranks"]
    found: dict[str, Any] = {}
    for name in {name: None for rank in ranks for name in rank["objects"]}:
        holders = [(n, rank) for n, rank in enumerate(ranks) if name in rank["objects"]]
        spellings = [[_unplaced(rank["state"][name]), _keys(rank, name)] for _, rank in holders]
        if len(holders) == len(ranks) and all(s == spellings[0] for s in spellings):
            found[name] = _decoded(exchange, ranks[0], name)
            continue
        for number, rank in holders:
            found.setdefault(f"rank{number}", {})[name] = _decoded(exchange, rank, name)
    return found


def _entries(parts: Sequence[Part]) -> Iterator[_Entry]:
    groups: dict[tuple[str, str, Shape, bool], list[_Leaf]] = {}
    for leaf in _leaves(parts):
        group = (leaf.name, leaf.tensor.dtype, leaf.shape, leaf.joint)
        groups.setdefault(group, []).append(leaf)
    used: set[str] = set()
    for (name, dtype, shape, joint), leaves in groups.items():
        if joint:
            together = _cover(leaves, shape)
        else:
            alike = len(leaves) == len(parts) and len({leaf.tensor.digest for leaf in leaves}) == 1
            together = leaves[:1] if alike else None
        if together is not None:
            yield _Entry(_key(name, "", used), dtype, shape, together, leaves)
            continue
        for leaf in leaves:
            alone = replace(leaf, box=Box.whole(leaf.tensor.shape))
            key = _key(name, f"rank{leaf.part.rank}/", used)
            yield _Entry(key, dtype, leaf.tensor.shape, [alone], [alone])


def _cover(leaves: Sequence[_Leaf], shape: Shape) -> list[_Leaf] | None:
    """One leaf for each box; None where boxes are missing, or held in two versions."""
    boxes: dict[Box, _Leaf] = {}
    for leaf in leaves:
        if boxes.setdefault(leaf.box, leaf).tensor.digest != leaf.tensor.digest:
            return None
    found = [leaf for box, leaf in boxes.items() if box.volume]
    return found if sum(leaf.box.volume for leaf in found) == math.prod(shape) else None


def _key(name: str, prefix: str, used: set[str]) -> str:
    base = key = prefix + name.replace("/", ".", 1)
    clash = 1
    while key in used:
        clash += 1
        key = f"{base}~{clash}"
    used.add(key)
    return key


def _leaves(parts: Sequence[Part]) -> Iterator[_Leaf]:
    if _by_dcp(parts):
        from autoglm_resume.checkpoint.dcp import pieces

        for part, piece in pieces.of(parts):
            box = Box(piece.offset, piece.tensor.shape)
            yield _Leaf(part, piece.tensor, piece.fqn, piece.shape, box, joint=True)
        return
    for part in parts:
        shardings = restore.shardings_of(part)
        for tensor in part.tensors:
            sharding = shardings.get(tensor.name)
            shape = sharding.shape if sharding else tensor.shape
            offset = sharding.offset if sharding else (0,) * len(shape)
            box = Box(offset, tensor.shape)
            yield _Leaf(part, tensor, tensor.name, shape, box, sharding is not None)


def _by_dcp(parts: Sequence[Part]) -> bool:
    from autoglm_resume.checkpoint.dcp.paths import METADATA

    return any(METADATA in part.objects for part in parts)


def _load(reader: ChunkReader, entry: _Entry, progress: verify.Progress | None) -> torch.Tensor:
    dtype, whole = tree.dtype_named(entry.dtype), Box.whole(entry.shape)
    found = torch.empty(entry.shape, dtype=dtype)
    for leaf in entry.sources:
        target = found if leaf.box == whole else torch.empty(leaf.tensor.shape, dtype=dtype)
        view = tree.as_bytes(target)
        for place, index in enumerate(leaf.tensor.chunks):
            start, chunk = place * CHUNK_BYTES, leaf.part.chunks[index]
            reader.read(leaf.part, chunk, view[start : start + chunk.raw], leaf.tensor.name)
            if progress:
                progress(chunk.raw)
        if target is not found:
            found[leaf.box.within(whole)] = target
    return found


def _document(
    manifest: Manifest, parts: Sequence[Part], entries: Sequence[_Entry]
) -> dict[str, Json]:
    homes = {
        (leaf.part.rank, leaf.tensor.name): (entry.key, leaf.box.offset)
        for entry in entries
        for leaf in entry.leaves
    }

    def row(part: Part, tensor: Tensor) -> Json:
        key, offset = homes[part.rank, tensor.name]
        return {
            "name": tensor.name,
            "key": key,
            "offset": list(offset),
            "shape": list(tensor.shape),
            "digest": tensor.digest,
        }

    return {
        "format": FORMAT,
        "id": manifest.id,
        "step": manifest.step,
        "versions": dict(manifest.versions),
        "metrics": dict(manifest.metrics),
        "dcp": _by_dcp(parts),
        "tensors": {entry.key: [entry.dtype, list(entry.shape)] for entry in entries},
        "ranks": [
            {
                "objects": dict(part.objects),
                "state": dict(part.state),
                "model": part.model.to_json() if part.model else None,
                "rng": part.rng,
                "data": part.data,
                "tensors": [row(part, tensor) for tensor in part.tensors],
            }
            for part in parts
        ],
    }


def _snapshot(exchange: Bundle, id: str, number: int, progress: verify.Progress | None) -> Snapshot:
    document = exchange.document
    rank = document["ranks"][number]
    contents = []
    for row in rank["tensors"]:
        contents.append(_tensor(exchange, row))
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
    )


def _tensor(exchange: Bundle, row: Json) -> TensorBytes:
    """What a rank has of a tensor, verified."""
    dtype, shape = exchange.document["tensors"][row["key"]]
    whole = exchange.tensors[row["key"]]
    if [tree.dtype_name(whole.dtype), list(whole.shape)] != [dtype, shape]:
        raise CorruptCheckpoint(
            f"export: {row['key']}: expected {shape} of {dtype}, found {list(whole.shape)} of"
            f" {tree.dtype_name(whole.dtype)}"
        )
    box = Box(tuple(row["offset"]), tuple(row["shape"]))
    local = whole[box.within(Box.whole(tuple(shape)))].contiguous()
    data = tree.as_bytes(local)
    chunks = range(0, len(data), CHUNK_BYTES)
    found = digest_of_digests(digest(data[start : start + CHUNK_BYTES]) for start in chunks)
    if found != row["digest"] or tuple(local.shape) != box.shape:
        raise CorruptCheckpoint(
            f"export: {row['key']}: expected {row['digest']} for {row['name']} of a rank, found"
            f" {found}",
            hint="only what autoglm exported, unchanged, can be imported again",
        )
    return TensorBytes(row["name"], dtype, box.shape, data)


def _content(exchange: Bundle, row: Json, offset: Json) -> torch.Tensor | bytes:
    found = exchange.tensors[row["key"]]
    return found if offset is not None else bytes(tree.as_bytes(found))


def _decoded(exchange: Bundle, rank: Json, name: str) -> Any:
    tensors = {
        row["name"]: exchange.tensors[row["key"]]
        for row in rank["tensors"]
        if object_of(row["name"]) == name
    }
    return tree.decode(rank["state"][name], tensors)


def _keys(rank: Json, name: str) -> list[Json]:
    return [[r["name"], r["key"]] for r in rank["tensors"] if object_of(r["name"]) == name]


def _unplaced(node: Json) -> Json:
    """A state tree without what differs between the shards of one tensor."""
    if isinstance(node, list):
        return [_unplaced(child) for child in node]
    if isinstance(node, dict):
        dropped = ("offset",) if "$dtensor" in node else ()
        return {key: _unplaced(child) for key, child in node.items() if key not in dropped}
    return node
