"""Snapshot to disk: chunk, hash, encode, write, read back, and only then show it.

A pack appears under its name after every byte of it has been read from the disk and compared.
Writing, flushing and reading back overlap: while one window of the pack is written, the one before
is flushed to the disk, dropped from the page cache, and read again.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from autoglm_resume import files
from autoglm_resume.checkpoint import codec, verify
from autoglm_resume.checkpoint.document import digest, digest_of_digests
from autoglm_resume.checkpoint.part import (
    CHUNK_BYTES,
    Chunk,
    Part,
    Tensor,
    object_digest,
    object_of,
    pack_file,
    part_file,
)
from autoglm_resume.checkpoint.snapshot import Snapshot
from autoglm_resume.checkpoint.store import Store
from autoglm_resume.errors import AutoglmError, CheckpointError

WINDOW_BYTES = 64 << 20


class SaveFailed(AutoglmError):
    """A checkpoint could not be written; the older ones are untouched."""


def persist(snapshot: Snapshot, store: Store) -> Part:
    """Write and verify this rank's part, then commit the checkpoint if it was the last one.

    Raises SaveFailed naming the file, the bytes needed and the bytes free; nothing half written is
    left then. (If only the commit failed, the parts stay, and a later commit can still succeed.)
    """
    directory = store.directory(snapshot.id)
    file = directory / part_file(snapshot.rank)
    pack = directory / pack_file(snapshot.rank)
    if file.exists():
        # An earlier try wrote it and failed to commit; a part is never written twice.
        return _committed(Part.decode(file.read_bytes(), str(file)), snapshot, store)
    try:
        _make_directory(directory)
        with files.writing(pack) as output:
            chunks, tensors = _write_pack(output, snapshot)
        # The fingerprint is taken after the rename, which changes the ctime.
        part = _part(snapshot, pack, chunks, tensors)
        files.write(file, part.encode())
    except (OSError, CheckpointError) as error:
        _discard(file, pack)
        raise _failure(error, pack, snapshot.nbytes) from error
    return _committed(part, snapshot, store)


def _committed(part: Part, snapshot: Snapshot, store: Store) -> Part:
    try:
        store.commit(snapshot.id)
    except (OSError, CheckpointError) as error:
        raise _failure(error, store.directory(snapshot.id), snapshot.nbytes) from error
    return part


def _write_pack(output: BinaryIO, snapshot: Snapshot) -> tuple[list[Chunk], list[Tensor]]:
    """Write and prove all chunks; equal ones are stored once."""
    tensors: list[Tensor] = []
    with ThreadPoolExecutor(1, thread_name_prefix="read-back") as prover:
        writer = _Writer(output, prover)
        for tensor in snapshot.tensors:
            starts = range(0, len(tensor.data), CHUNK_BYTES)
            indices = tuple(writer.add(tensor.data[i : i + CHUNK_BYTES]) for i in starts)
            content = digest_of_digests(writer.chunks[i].digest for i in indices)
            tensors.append(Tensor(tensor.name, tensor.dtype, tensor.shape, content, indices))
        writer.prove()
        for proof in writer.proofs:
            proof.result()
    return writer.chunks, tensors


class _Writer:
    """Appends chunks to `output`, and hands each full window to `prover`."""

    def __init__(self, output: BinaryIO, prover: ThreadPoolExecutor) -> None:
        self.output = output
        self.prover = prover
        self.chunks: list[Chunk] = []
        self.proofs: list[Future[None]] = []
        self._index: dict[str, int] = {}
        self._end = 0
        self._proven = 0
        self._window = 0

    def add(self, raw: memoryview) -> int:
        """Index of this chunk, written now unless an equal one was before."""
        name = digest(raw)
        if name in self._index:
            return self._index[name]
        kind, stored = codec.encode(raw)
        self.output.write(stored)
        self._index[name] = len(self.chunks)
        self.chunks.append(Chunk(name, len(raw), len(stored), self._end, kind))
        self._end += len(stored)
        self._window += len(stored)
        if self._window >= WINDOW_BYTES:
            self.prove()
        return self._index[name]

    def prove(self) -> None:
        self.output.flush()
        window = self.chunks[self._proven :]
        self._proven, self._window = len(self.chunks), 0
        self.proofs.append(self.prover.submit(_prove, self.output, window))


def _prove(output: BinaryIO, window: list[Chunk]) -> None:
    """Flush the file, and read `window` back from the disk rather than from the page cache."""
    os.fdatasync(output.fileno())
    if not window:
        return
    start, end = window[0].offset, window[-1].offset + window[-1].stored
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with Path(output.name).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
        for chunk in window:
            place = f"{output.name}: reading it back"
            verify.read_chunk(file.fileno(), chunk, buffer[: chunk.raw], place)


def _part(snapshot: Snapshot, pack: Path, chunks: list[Chunk], tensors: list[Tensor]) -> Part:
    tables: dict[str, list[Tensor]] = {name: [] for name in snapshot.trees}
    for tensor in tensors:
        tables[object_of(tensor.name)].append(tensor)
    return Part(
        id=snapshot.id,
        step=snapshot.step,
        rank=snapshot.rank,
        world_size=snapshot.world_size,
        lineage=snapshot.lineage,
        created=snapshot.created,
        versions=snapshot.versions,
        model=snapshot.model,
        objects={name: object_digest(snapshot.trees[name], tables[name]) for name in tables},
        state=snapshot.trees,
        tensors=tuple(tensors),
        chunks=tuple(chunks),
        pack=pack.name,
        fingerprint=verify.fingerprint(pack),
        rng=snapshot.rng,
        data=snapshot.data,
    )


def _make_directory(directory: Path) -> None:
    root = directory.parent
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        files.sync_directory(root.parent)
    directory.mkdir(exist_ok=True)
    # By every rank, because the one that made it may die before this.
    files.sync_directory(root)


def _discard(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _failure(error: Exception, file: Path, needed: int) -> SaveFailed:
    hint = "training goes on, and the checkpoint before stays the latest"
    if not isinstance(error, OSError):
        return SaveFailed(f"{file}: not saved: {error}", hint=hint)
    free = "an unknown number"
    with suppress(OSError):
        disk = os.statvfs(next(place for place in (file, *file.parents) if place.exists()))
        free = f"{disk.f_bavail * disk.f_frsize:,}"
    return SaveFailed(
        f"{file}: not saved: {error.strerror}; it needs {needed:,} bytes, {free} are free there",
        hint=hint,
    )
