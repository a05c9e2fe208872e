"""A checkpoint of so many ranks on another number of them.

What all ranks had alike, any of them serves. A DTensor is put together from the shards of all of
them, as far as this rank needs it. What differs between ranks in any other way cannot be dealt
anew, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Tensor, object_of
from autoglm_resume.checkpoint.state import layout, leaves, tree
from autoglm_resume.checkpoint.state.restore import RestoredPart, all_leaves, decoded, shardings_of
from autoglm_resume.checkpoint.state.sharding import Box, Present, Shape, Sharding
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, WorldSizeMismatch


@dataclass(frozen=True)
class Shard:
    """`box` of a tensor, as rank `part.rank` stored it."""

    part: Part
    tensor: Tensor
    box: Box


def read(
    store: Store,
    path: Path,
    rank: int,
    present: Present | None = None,
    *,
    own: Collection[str] = (),
    led: Collection[str] = (),
    threads: int = 2,
    progress: verify.Progress | None = None,
) -> RestoredPart:
    """The state of a rank that may not have been there, from the checkpoint in `path`.

    All of it is verified, all of it fresh. `present` says how DTensors are spread now; without it
    they come back whole. Of the objects in `own` every rank has one of its own: where `rank` had
    none, there is none in the result. Tensors in `led` are rank 0's, whatever the others had.
    Raises CheckpointError; WorldSizeMismatch naming an object that ranks had differently.
    """
    count = store.load_manifest(path).world_size
    parts = [store.load_part(path, each) for each in range(count)]
    first = parts[min(rank, count - 1)]
    states = {
        name: state for name, state in first.state.items() if name not in own or first.rank == rank
    }
    others = _led(parts, [name for name in states if name not in own], frozenset(led))
    needed = [tensor for tensor in first.tensors if object_of(tensor.name) in states]
    shardings = [shardings_of(part) for part in parts]
    tables = [{tensor.name: tensor for tensor in part.tensors} for part in parts]
    tensors: dict[str, torch.Tensor] = {}
    copies: list[_Copying] = []
    wrapped = []
    for tensor in needed:
        name = tensor.name
        sharding = shardings[first.rank].get(name)
        shape = sharding.shape if sharding else tensor.shape
        if sharding is None:
            source = first if object_of(name) in own else parts[0]
            shards = [Shard(source, tables[source.rank][name], Box.whole(shape))]
        else:
            shards = _shards(name, parts, tables, shardings)
        arrangement = present.arranged(name, shape, sharding) if present else None
        box = arrangement.box(shape) if arrangement else Box.whole(shape)
        target = tensors[name] = _empty(path, name, box.shape, tensor.dtype)
        copies += _copies(target, box, shards)
        if arrangement is not None:
            wrapped.append((name, arrangement, shape))
    with ChunkReader(path, parts) as reader:
        verify.on_threads(
            len(copies),
            lambda index, _: copies[index].run(reader, progress),
            lambda: memoryview(b""),
            threads,
        )
    found = all_leaves(first)
    for name, arrangement, shape in wrapped:
        local = layout.ordered(name, tensors[name], found[name])
        tensors[name] = arrangement.wrap(local, shape)
    mine = replace(first, state=states)
    return RestoredPart(mine, decoded(mine, tensors), led=others)


@dataclass(frozen=True)
class _Copying:
    """`overlap` of `shard` goes to `target`, which is `box` of the tensor."""

    target: torch.Tensor
    box: Box
    shard: Shard
    overlap: Box

    def run(self, reader: ChunkReader, progress: verify.Progress | None) -> None:
        """Read and verify the chunks that it lies in, and copy."""
        part, tensor, box = self.shard.part, self.shard.tensor, self.shard.box
        # Memory that nothing is read into costs nothing.
        direct = box == self.box
        source = self.target if direct else torch.empty(box.shape, dtype=self.target.dtype)
        view, size = tree.as_bytes(source), source.element_size()
        first, last = self.overlap.span(box)
        for index in range(first * size // CHUNK_BYTES, -(-last * size // CHUNK_BYTES)):
            chunk = part.chunks[tensor.chunks[index]]
            start = index * CHUNK_BYTES
            reader.read(part, chunk, view[start : start + chunk.raw], tensor.name)
            if progress:
                progress(chunk.raw)
        if not direct:
            self.target[self.overlap.within(self.box)] = source[self.overlap.within(box)]


def _copies(target: torch.Tensor, box: Box, shards: Sequence[Shard]) -> Iterator[_Copying]:
    for shard in shards:
        overlap = shard.box.overlap(box)
        if overlap is not None:
            yield _Copying(target, box, shard, overlap)


def _shards(
    name: str,
    parts: Sequence[Part],
    tables: Sequence[Mapping[str, Tensor]],
    shardings: Sequence[Mapping[str, Sharding]],
) -> list[Shard]:
    """The shards that make up a tensor, each once. Raises CorruptCheckpoint if they do not."""
    found: dict[Box, Shard] = {}
    for part, table, known in zip(parts, tables, shardings, strict=True):
        tensor = table[name]
        box = Box(known[name].offset, tensor.shape)
        if box.volume:
            found.setdefault(box, Shard(part, tensor, box))
    shape, dtype = known[name].shape, tensor.dtype
    expected, volume = Box.whole(shape).volume, sum(box.volume for box in found)
    if volume != expected or {shard.tensor.dtype for shard in found.values()} - {dtype}:
        raise CorruptCheckpoint(
            f"{parts[0].id}: {name}: expected shards of {dtype} with {expected} elements in all,"
            f" found {volume}"
        )
    return list(found.values())


def _empty(path: Path, name: str, shape: Shape, dtype: str) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=tree.dtype_named(dtype))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {name}: no memory for it: {error}") from error


def _led(parts: Sequence[Part], names: Sequence[str], led: Collection[str]) -> Collection[str]:
    """Tensors in `led` that ranks had differently, though they had these objects alike otherwise.

    Raises WorldSizeMismatch, naming where, if they had not.
    """
    first = parts[0]
    others: set[str] = set()
    for other in parts[1:]:
        for name in names:
            if first.objects.get(name) == other.objects.get(name):
                continue
            where = difference(first.state.get(name), other.state.get(name), name)
            if not where:
                differing = differing_tensors(first, other, name)
                others.update(each for each in differing if each in led)
                where = next((each for each in differing if each not in led), "")
            if where:
                raise WorldSizeMismatch(
                    f"{first.id}: {where}: rank {other.rank} had another one than rank 0, so"
                    f" {name} of {len(parts)} ranks cannot be dealt to another number of them",
                    hint=f"run with {len(parts)} ranks (nproc_per_node), or let {name} have the"
                    " same state on every rank (a position in the data is that, as autoglm's"
                    " ResumableSampler has it)",
                )
    return others


def differing_tensors(first: Part, other: Part, name: str) -> list[str]:
    """The tensors of an object that two ranks had differently, but for shards of one."""
    passed = leaves.sharded_leaves(first.state[name])
    theirs = {tensor.name: replace(tensor, chunks=()) for tensor in other.tensors}
    return [
        tensor.name
        for tensor in first.tensors
        if object_of(tensor.name) == name
        and tensor.name not in passed
        and theirs.get(tensor.name) != replace(tensor, chunks=())
    ]


def difference(ours: Json, theirs: Json, where: str) -> str:
    """Where two trees differ, other than in how DTensors are spread; empty if nowhere."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if "$dtensor" in ours and "$dtensor" in theirs:
            same = all(ours.get(key) == theirs.get(key) for key in ("$dtensor", "shape"))
            return "" if same else where
        if "$tensor" in ours and "$tensor" in theirs:
            ours, theirs = layout.without(ours), layout.without(theirs)
        if list(ours) != list(theirs):
            return where
        pairs = [(f"{where}.{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(where, a, b) for a, b in zip(ours, theirs, strict=True)]
    else:
        return "" if type(ours) is type(theirs) and ours == theirs else where
    return next(filter(None, (difference(a, b, where) for where, a, b in pairs)), "")
