"""Checkpoint to state: every chunk is verified in fresh memory before anything is handed out.

Nothing that a model already holds is touched here, so a checkpoint that turns out bad costs
nothing but the time to read it. A snapshot in shared memory is copied out, never aliased.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm_resume import linux
from autoglm_resume.checkpoint.chunks import memory, verify
from autoglm_resume.checkpoint.chunks.cut import items_of
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk, Tensor
from autoglm_resume.checkpoint.state import decoding, layout, leaves, tree
from autoglm_resume.checkpoint.state.sharding import (
    Arrangement,
    Box,
    Present,
    Shape,
    Sharding,
    is_sharded,
)
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import in_memory
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint


class OtherSharding(CheckpointError):
    """Tensors are spread over the ranks in another way than when they were saved."""


@dataclass(frozen=True)
class RestoredPart:
    """`states` maps each object to the state that was saved."""

    part: Part
    states: Mapping[str, Any]
    from_memory: bool = False
    led: Collection[str] = ()
    """Names of tensors that are rank 0's though others had other ones."""


def read(
    store: Store,
    path: Path,
    rank: int,
    device: torch.device | str = "cpu",
    *,
    present: Present | None = None,
    memory: Snapshot | None = None,
    threads: int = 2,
    progress: verify.Progress | None = None,
) -> RestoredPart:
    """Rank `rank`'s state from the checkpoint in `path`, all of it verified, all of it fresh.

    With `present`, DTensors come back as such, else as the shards that this rank had of them. With
    `memory`, the rank's snapshot of that checkpoint, packs are not read; what the storage says of
    it still decides. Tensors that were on a device come back on `device`, the others (as generator
    states) always in host memory. Raises CheckpointError naming the file, the tensor, what was
    expected and what was found; OtherSharding before anything is read.
    """
    part = store.load_part(path, rank)
    spread = _spread(part, present) if present else {}
    if memory is not None:
        tensors = _from_memory(part, memory, threads)
    else:
        with ChunkReader(path, store.parts_for(path, part)) as reader:
            chunks = _chunks(part)

            def load(piece: _ChunkTarget) -> None:
                chunk = chunks[piece.name][piece.index]
                reader.read(part, chunk, piece.target, piece.name)
                if progress:
                    progress(chunk.raw)

            tensors = _fill(part.id, part.tensors, load, threads)
    return _restored(part, tensors, spread, device, from_memory=memory is not None)


def read_sealed(
    memory: Snapshot,
    seal: str,
    device: torch.device | str = "cpu",
    *,
    present: Present | None = None,
    threads: int = 2,
) -> RestoredPart:
    """The state in a snapshot in memory, if it is what `seal` was put on; see write/in_memory.py.

    As `read` does it. Raises CorruptCheckpoint if it is not, and OtherSharding.
    """
    content = {tensor.name: tensor.data for tensor in memory.tensors}
    names: dict[tuple[str, int], str] = {}

    def load(piece: _ChunkTarget) -> None:
        piece.target[:] = content[piece.name][piece.start : piece.start + len(piece.target)]
        names[piece.name, piece.index] = digest(piece.target)

    tensors = _fill(memory.id, memory.tensors, load, threads)
    named = [names[item.position] for item in items_of(memory)]
    if (found := in_memory.seal(memory, named)) != seal:
        raise CorruptCheckpoint(
            f"{memory.id}: rank {memory.rank}: expected seal {seal} on the snapshot in memory,"
            f" found {found}"
        )
    part = in_memory.part_in_memory(memory, named)
    spread = _spread(part, present) if present else {}
    return _restored(part, tensors, spread, device, from_memory=True)


def _restored(
    part: Part,
    tensors: dict[str, torch.Tensor],
    spread: Mapping[str, tuple[Arrangement, Shape]],
    device: torch.device | str,
    *,
    from_memory: bool,
) -> RestoredPart:
    found = all_leaves(part)
    for name, (arrangement, shape) in spread.items():
        local = layout.ordered(name, tensors[name], found[name])
        tensors[name] = arrangement.wrap(local, shape)
    return RestoredPart(part, decoded(part, tensors, device), from_memory)


def decoded(
    part: Part, tensors: dict[str, torch.Tensor], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The states in `part`, made of its `tensors`. Raises CorruptCheckpoint."""
    states: dict[str, Any] = {}
    for name, state in part.state.items():
        for leaf in leaves.device_leaves(state):
            if leaf in tensors and not is_sharded(tensors[leaf]):
                tensors[leaf] = tensors[leaf].to(device)
        states[name] = decoding.decode(state, tensors)
    if tensors:
        raise CorruptCheckpoint(
            f"{part.id}: rank {part.rank}: expected every tensor in a state, found"
            f" {next(iter(tensors))} in none"
        )
    return states


def all_leaves(part: Part) -> dict[str, layout.Leaf]:
    """Of all states, by the names of their tensors."""
    return dict(leaf for state in part.state.values() for leaf in leaves.leaves(state))


def shardings_of(part: Part) -> dict[str, Sharding]:
    """Of its DTensors, by name. Raises CorruptCheckpoint."""
    found: dict[str, Sharding] = {}
    for state in part.state.values():
        found.update(leaves.sharded_leaves(state))
    return found


def _spread(part: Part, present: Present) -> dict[str, tuple[Arrangement, Shape]]:
    """The tensors to be made DTensors, and their shapes. Raises OtherSharding."""
    shardings = shardings_of(part)
    found: dict[str, tuple[Arrangement, Shape]] = {}
    for tensor in part.tensors:
        sharding = shardings.get(tensor.name)
        shape = sharding.shape if sharding else tensor.shape
        arrangement = present.arranged(tensor.name, shape, sharding)
        had = Box(sharding.offset, tensor.shape) if sharding else Box.whole(shape)
        has = arrangement.box(shape) if arrangement else Box.whole(shape)
        if had != has and (had.volume or has.volume):
            raise OtherSharding(f"{part.id}: {tensor.name}: expected {has}, found {had}")
        if arrangement is not None:
            found[tensor.name] = arrangement, shape
    return found


@dataclass(frozen=True)
class _ChunkTarget:
    """`target` is where chunk `index` of tensor `name` goes, at `address`."""

    name: str
    index: int
    target: memoryview
    address: int

    @property
    def start(self) -> int:
        """In the tensor."""
        return self.index * CHUNK_BYTES


def _chunks(part: Part) -> dict[str, list[Chunk]]:
    """Of each tensor."""
    return {t.name: [part.chunks[index] for index in t.chunks] for t in part.tensors}


def _from_memory(part: Part, memory: Snapshot, threads: int) -> dict[str, torch.Tensor]:
    content = {tensor.name: tensor.data for tensor in memory.tensors}
    chunks = _chunks(part)

    def load(piece: _ChunkTarget) -> None:
        size, expected = len(piece.target), chunks[piece.name][piece.index].digest
        source = content.get(piece.name, memoryview(b""))[piece.start : piece.start + size]
        if len(source) == size:
            piece.target[:] = source
        if len(source) != size or digest(piece.target) != expected:
            raise CorruptCheckpoint(
                f"{part.id}: {piece.name}: expected {expected} in the snapshot in memory,"
                " found other bytes"
            )

    return _fill(part.id, part.tensors, load, threads)


def _fill(
    id: str,
    entries: Sequence[Tensor | TensorBytes],
    load: Callable[[_ChunkTarget], None],
    threads: int,
) -> dict[str, torch.Tensor]:
    """Fresh tensors, by name, every chunk of which has been `load`ed."""
    memory.require(id, entries)
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[_ChunkTarget] = []
    for entry in entries:
        try:
            tensor = torch.empty(entry.shape, dtype=tree.dtype_named(entry.dtype))
        except RuntimeError as error:
            raise CheckpointError(f"{id}: {entry.name}: no memory for it: {error}") from error
        tensors[entry.name] = tensor
        view = tree.as_bytes(tensor)
        for index, start in enumerate(range(0, entry.nbytes, CHUNK_BYTES)):
            target = view[start : start + CHUNK_BYTES]
            pieces.append(_ChunkTarget(entry.name, index, target, tensor.data_ptr() + start))

    def fill(index: int, _: memoryview) -> None:
        piece = pieces[index]
        # One call is cheaper than a page fault for every page of it.
        linux.populate(piece.address, len(piece.target))
        load(piece)

    verify.on_threads(len(pieces), fill, lambda: memoryview(b""), threads)
    return tensors
