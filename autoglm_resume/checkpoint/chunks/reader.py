"""Chunks of a checkpoint, wherever they lie: found, decoded, and verified."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import casts, codec
from autoglm_resume.checkpoint.chunks.verify import fingerprint, read_exactly, reading
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.part import Part, part_file
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk, Pack
from autoglm_resume.errors import CorruptCheckpoint

QUARANTINE = "quarantine"


def pack_path(path: Path, part: Part, pack: Pack) -> Path:
    """Where `pack` of `part` lies, for the checkpoint in the directory `path`."""
    if pack.id == part.id:
        return path / part.pack
    root = path.parent.parent if path.parent.name == QUARANTINE else path.parent
    return root / pack.id / part.pack


class _Room(threading.local):
    """Each thread's own, the same every time: fresh memory takes longer to touch than to fill."""

    def __init__(self) -> None:
        self._memory: dict[int, memoryview] = {}

    def of(self, slot: int, size: int) -> memoryview:
        """`size` bytes, until the next call for the same slot."""
        if slot not in self._memory or len(self._memory[slot]) < size:
            self._memory[slot] = memoryview(bytearray(max(size, CHUNK_BYTES)))
        return self._memory[slot][:size]


class ChunkReader:
    """Chunks of the parts of the checkpoint in `path`, from any thread.

    `parts` are those of all ranks where ranks share chunks; of one rank where it has them all.
    """

    def __init__(self, path: Path, parts: Sequence[Part]) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._room = _Room()
        self._files: dict[tuple[int, int], int] = {}
        self._shared: dict[str, tuple[Part, Chunk]] = {}
        if any(chunk.with_peer for part in parts for chunk in part.chunks):
            for part in parts:
                located = ((c.digest, (part, c)) for c in part.chunks if c.pack is not None)
                self._shared.update(located)

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def read(self, part: Part, chunk: Chunk, target: memoryview, what: str) -> None:
        """Fill `target` (of `chunk.raw` bytes), and verify its digest.

        Raises CheckpointError naming the file and `what`; `target` then holds garbage.
        """
        part, chunk = self._located(part, chunk, what)
        self._decode(part, chunk, target, what)
        if digest(target) == chunk.digest:
            return
        # The one to blame may be further back.
        for index in chunk.cast_of if chunk.base is None else (chunk.base,):
            base = part.chunks[index]
            self.read(part, base, memoryview(bytearray(base.raw)), what)
        raise CorruptCheckpoint(
            f"{self._path_of(part, chunk)}: {what}: expected {chunk.digest}, found {digest(target)}"
            f" ({chunk.stored} bytes at offset {chunk.offset})"
        )

    def _located(self, part: Part, chunk: Chunk, what: str) -> tuple[Part, Chunk]:
        """The same chunk where it is stored, or cast."""
        if not chunk.with_peer:
            return part, chunk
        if chunk.digest not in self._shared:
            raise CorruptCheckpoint(
                f"{self._path}: {what}: expected chunk {chunk.digest} in the part of another"
                " rank, found it in none"
            )
        return self._shared[chunk.digest]

    def _decode(self, part: Part, chunk: Chunk, target: memoryview, what: str) -> None:
        if chunk.cast_of:
            sources = [self._located(part, part.chunks[index], what) for index in chunk.cast_of]
            master = self._room.of(3, sum(source.raw for _, source in sources))
            begin = 0
            for owner, source in sources:
                self._decode(owner, source, master[begin : begin + source.raw], what)
                begin += source.raw
            casts.cast(chunk.codec, master, target)
            return
        chain = [chunk]
        while chain[-1].base is not None:
            chain.append(part.chunks[chain[-1].base])
        base = None
        for depth in reversed(range(len(chain))):
            link = chain[depth]
            # Of a chain two links are needed at a time.
            into = target if depth == 0 else self._room.of(depth % 2, link.raw)
            self._decode_one(part, link, into, base, what)
            base = into

    def _decode_one(
        self, part: Part, chunk: Chunk, target: memoryview, base: memoryview | None, what: str
    ) -> None:
        assert chunk.pack is not None
        direct = chunk.codec == codec.RAW and chunk.stored == chunk.raw
        with reading(self._path_of(part, chunk)):
            fd = self._file(part, chunk.pack)
            stored = target if direct else self._room.of(2, chunk.stored)
            count = read_exactly(fd, stored, chunk.offset)
        where = f"{self._path_of(part, chunk)}: {what}"
        if count != chunk.stored:
            raise CorruptCheckpoint(
                f"{where}: expected {chunk.stored} bytes at offset {chunk.offset}, found {count}"
            )
        if not direct:
            try:
                codec.decode(chunk.codec, stored, target, base)
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(f"{where}: {error.message}") from None

    def _path_of(self, part: Part, chunk: Chunk) -> Path:
        if chunk.pack is None:
            return self._path / part_file(part.rank)
        return pack_path(self._path, part, part.packs[chunk.pack])

    def _file(self, part: Part, pack: int) -> int:
        key = (part.rank, pack)
        with self._lock:
            if key not in self._files:
                path = pack_path(self._path, part, part.packs[pack])
                fd = self._files[key] = files.opened(path)
                expected, found = part.packs[pack].fingerprint.size, fingerprint(fd).size
                if expected != found:
                    raise CorruptCheckpoint(f"{path}: expected {expected} bytes, found {found}")
            return self._files[key]
