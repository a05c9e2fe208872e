"""What was written is read back from the storage, decoded and compared, while more is written."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from autoglm_resume.checkpoint.chunks import codec
from autoglm_resume.checkpoint.chunks.direct_io import Input
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk
from autoglm_resume.errors import CorruptCheckpoint

THREADS = 2
RUN_BYTES = 2 << 20
"""What is read at once."""


@dataclass(frozen=True)
class Written:
    """A chunk that is in the file, and the raw bytes of its base."""

    chunk: Chunk
    base: memoryview | None

    @property
    def end(self) -> int:
        """Its last byte's offset, plus one."""
        return self.chunk.offset + self.chunk.stored


@dataclass(frozen=True)
class Proof:
    """`stored` bytes are on the storage. Seconds it took to flush and to read them, and that
    decoding those of them that are encoded, to `decoded` bytes, kept a processor busy.
    """

    stored: int
    flushing: float
    reading: float
    decoded: int
    decoding: float


class Prover:
    """Proves a file that still grows, in threads of its own."""

    def __init__(self, file: BinaryIO) -> None:
        """`file` has a name. Raises OSError."""
        self._fd = file.fileno()
        self._path = Path(file.name)
        self._flush = threading.Lock()
        self._inputs = SimpleQueue[Input]()
        self._proofs: deque[Future[Proof]] = deque()
        with ExitStack() as opening:
            for _ in range(THREADS):
                self._inputs.put(opening.enter_context(closing(Input(self._path, RUN_BYTES))))
            self._pool = opening.enter_context(ThreadPoolExecutor(THREADS, "read-back"))
            self._open = opening.pop_all()

    def close(self) -> None:
        """Give up what has not begun, and wait for what has."""
        for proof in self._proofs:
            proof.cancel()
        self._open.close()

    def begin(self, window: Sequence[Written]) -> None:
        """Prove these chunks, which are in the file, one behind the other."""
        self._proofs.append(self._pool.submit(self._prove, window))

    def proofs(self, *, wait: bool) -> Iterator[Proof]:
        """Those since the last call, or with `wait` all that were begun.

        Raises OSError, and CorruptCheckpoint for other bytes than those that were written.
        """
        while self._proofs and (wait or self._proofs[0].done()):
            yield self._proofs.popleft().result()

    def _prove(self, window: Sequence[Written]) -> Proof:
        # One after the other, or each would count what the other waits for.
        with self._flush:
            began = time.perf_counter()
            os.fdatasync(self._fd)
            flushing = time.perf_counter() - began
        reading = decoding = 0.0
        decoded = 0
        raw = memoryview(bytearray(CHUNK_BYTES))
        file = self._inputs.get()
        try:
            for run in _runs(window):
                start = run[0].chunk.offset
                began = time.perf_counter()
                found = file.read(start, run[-1].end - start)
                reading += time.perf_counter() - began
                for written in run:
                    stored = found[written.chunk.offset - start : written.end - start]
                    seconds = self._compare(written, stored, raw)
                    if written.chunk.codec != codec.RAW:
                        decoded += written.chunk.raw
                        decoding += seconds
        finally:
            self._inputs.put(file)
        return Proof(sum(w.chunk.stored for w in window), flushing, reading, decoded, decoding)

    def _compare(self, written: Written, stored: memoryview, raw: memoryview) -> float:
        """Seconds that decoding kept a processor busy; `raw` is room for it."""
        chunk, where = written.chunk, f"{self._path}: reading it back"
        if len(stored) != chunk.stored:
            raise CorruptCheckpoint(
                f"{where}: expected {chunk.stored} bytes at offset {chunk.offset}, found"
                f" {len(stored)}"
            )
        seconds = 0.0
        if chunk.codec == codec.RAW:
            raw = stored
        else:
            raw = raw[: chunk.raw]
            busy = time.thread_time()
            try:
                codec.decode(chunk.codec, stored, raw, written.base)
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(f"{where}: {error.message}") from None
            seconds = time.thread_time() - busy
        if (found := digest(raw)) != chunk.digest:
            raise CorruptCheckpoint(f"{where}: expected {chunk.digest}, found {found}")
        return seconds


def _runs(window: Sequence[Written]) -> Iterator[list[Written]]:
    """Chunks that are read at once."""
    run: list[Written] = []
    for written in window:
        if run and written.end - run[0].chunk.offset > RUN_BYTES:
            yield run
            run = []
        run.append(written)
    if run:
        yield run
