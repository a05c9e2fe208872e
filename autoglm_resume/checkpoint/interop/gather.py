"""A checkpoint of ours put together: what ranks hold of a tensor, or hold alike, is there once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from autoglm_resume.checkpoint.chunks import memory, verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Tensor, object_of
from autoglm_resume.checkpoint.interop.bundle import FORMAT, Bundle
from autoglm_resume.checkpoint.state import layout, reshard, restore, tree
from autoglm_resume.checkpoint.state.sharding import Box, Shape
from autoglm_resume.checkpoint.store.store import Store


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
    leaf: layout.Leaf = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A tensor to export, and where its boxes are read."""

    key: str
    dtype: str
    shape: Shape
    sources: Sequence[_Leaf]
    leaves: Sequence[_Leaf]
    """All leaves that it brings back."""

    @property
    def order(self) -> layout.Leaf:
        """What says in which order it lay in memory."""
        return self.leaves[0].leaf


def gather(
    store: Store,
    path: Path,
    progress: verify.Progress | None = None,
    *,
    only: str | None = None,
) -> Bundle:
    """The checkpoint in `path`, every byte verified; `progress` gets bytes of tensors.

    With `only`, that object alone is read, where objects are told apart. Raises CheckpointError.
    """
    manifest = store.load_manifest(path)
    parts = [store.load_part(path, ref.rank) for ref in manifest.parts]
    if only is not None and not _by_dcp(parts):
        parts = [_with_only(part, only) for part in parts]
    entries = list(_entries(parts))
    memory.require(manifest.id, [Tensor(e.key, e.dtype, e.shape, "", ()) for e in entries])
    tensors: dict[str, torch.Tensor] = {}
    with ChunkReader(path, parts) as reader:

        def load(index: int, _: memoryview) -> None:
            entry = entries[index]
            loaded = _load(reader, entry, progress)
            tensors[entry.key] = layout.ordered(entry.key, loaded, entry.order)

        verify.on_threads(len(entries), load, lambda: memoryview(b""))
    return Bundle(_document(manifest, parts, entries), {e.key: tensors[e.key] for e in entries})


def _entries(parts: Sequence[Part]) -> Iterator[_Entry]:
    groups: dict[tuple[str, str, Shape, bool], list[_Leaf]] = {}
    for leaf in _leaves(parts):
        group = (leaf.name, leaf.tensor.dtype, leaf.shape, leaf.joint)
        groups.setdefault(group, []).append(leaf)
    used: set[str] = set()
    led = led_objects(parts)
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
            # A buffer of a model that all ranks have is the model's as rank 0 has it.
            plain = leaf.part.rank == 0 and object_of(name) in led
            key = _key(name, "" if plain else f"rank{leaf.part.rank}/", used)
            yield _Entry(key, dtype, leaf.tensor.shape, [alone], [alone])


def led_objects(parts: Sequence[Part]) -> set[str]:
    """Those that all ranks have alike but for buffers of a module: one model, as rank 0 has it."""
    first = parts[0]
    known = first.parameters.buffers if first.parameters else ()
    buffers = {name.replace(".", "/", 1) for name in known}
    found = set()
    for name in {object_of(buffer) for buffer in buffers} & first.objects.keys():
        others = [part for part in parts[1:] if name in part.objects]
        if len(others) == len(parts) - 1 and all(
            not reshard.difference(first.state[name], other.state[name], name)
            and buffers.issuperset(reshard.differing_tensors(first, other, name))
            for other in others
        ):
            found.add(name)
    return found


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
        shardings, found = restore.shardings_of(part), restore.all_leaves(part)
        for tensor in part.tensors:
            sharding = shardings.get(tensor.name)
            shape = sharding.shape if sharding else tensor.shape
            offset = sharding.offset if sharding else (0,) * len(shape)
            box = Box(offset, tensor.shape)
            joint, leaf = sharding is not None, found.get(tensor.name, {})
            yield _Leaf(part, tensor, tensor.name, shape, box, joint, leaf)


def _with_only(part: Part, name: str) -> Part:
    return replace(
        part,
        objects={key: value for key, value in part.objects.items() if key == name},
        state={key: value for key, value in part.state.items() if key == name},
        tensors=tuple(tensor for tensor in part.tensors if object_of(tensor.name) == name),
    )


def _by_dcp(parts: Sequence[Part]) -> bool:
    from autoglm_resume.checkpoint.dcp.paths import METADATA

    return any(METADATA in part.objects for part in parts)


def _load(reader: ChunkReader, entry: _Entry, progress: verify.Progress | None) -> torch.Tensor:
    dtype, whole = tree.dtype_named(entry.dtype), Box.whole(entry.shape)
    # Whoever says which boxes there are may have left gaps, which nobody's memory may fill.
    found = torch.zeros(entry.shape, dtype=dtype)
    for leaf in entry.sources:
        target = found if leaf.box == whole else torch.empty(leaf.tensor.shape, dtype=dtype)
        view = tree.as_bytes(target)
        for nth, index in enumerate(leaf.tensor.chunks):
            start, chunk = nth * CHUNK_BYTES, leaf.part.chunks[index]
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
        "led": sorted(led_objects(parts)),
        "tensors": {entry.key: [entry.dtype, list(entry.shape)] for entry in entries},
        "ranks": [
            {
                "objects": dict(part.objects),
                "state": dict(part.state),
                "model": part.model.to_json() if part.model else None,
                "parameters": part.parameters.to_json() if part.parameters else None,
                "rng": part.rng,
                "data": part.data,
                "tensors": [row(part, tensor) for tensor in part.tensors],
            }
            for part in parts
        ],
    }
