"""Chunks into a pack: share, encode and write, and prove what was written, all at once.

While one window of the pack is encoded and written, the one before is flushed to the disk, dropped
from the page cache, read again and decoded.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

from autoglm_resume.checkpoint import codec
from autoglm_resume.checkpoint.codec import Effort, Encoded
from autoglm_resume.checkpoint.document import digest
from autoglm_resume.checkpoint.options import Compress
from autoglm_resume.checkpoint.part import CHUNK_BYTES, Chunk
from autoglm_resume.checkpoint.previous import Sharing, Table
from autoglm_resume.checkpoint.snapshot import Snapshot, TensorBytes
from autoglm_resume.checkpoint.verify import read_exactly
from autoglm_resume.errors import CorruptCheckpoint

THREADS = 2
WINDOW_BYTES = 64 << 20
AHEAD = 16
"""Chunks that are encoded before they are written."""


@dataclass(frozen=True)
class Item:
    """Chunk `place` of a tensor; `name` is its digest, once it is `named`."""

    tensor: str
    place: int
    dtype: str
    raw: memoryview
    name: str = ""

    def named(self) -> Item:
        """With its digest."""
        return replace(self, name=digest(self.raw))


def chunks_of(tensor: TensorBytes) -> list[Item]:
    """The chunks of one tensor, in order."""
    return [
        Item(tensor.name, place, tensor.dtype, tensor.data[start : start + CHUNK_BYTES])
        for place, start in enumerate(range(0, len(tensor.data), CHUNK_BYTES))
    ]


def items_of(snapshot: Snapshot) -> list[Item]:
    """All chunks of a snapshot, in order."""
    return [item for tensor in snapshot.tensors for item in chunks_of(tensor)]


class Pace:
    """How fast this machine encodes and this storage takes bytes, as far as was seen."""

    def __init__(self) -> None:
        self.encoding = 0.0
        """Raw bytes per second, all threads together."""
        self.writing = 0.0
        """Stored bytes per second."""

    def saw(self, raw: int, encoding: float, stored: int, writing: float) -> None:
        """Seconds that one save spent in either, however much they overlapped."""
        if encoding > 0 and raw:
            self.encoding = raw * THREADS / encoding
        if writing > 0 and stored:
            self.writing = stored / writing

    def effort(self, compress: Compress) -> Effort:
        """What pays: compression must not be slower than the storage it saves."""
        if compress != "auto":
            return compress
        if not self.writing or not self.encoding:
            return "fast"
        if self.writing > self.encoding:
            return "off"
        # A delta takes about twice as long to encode as planes alone.
        return "small" if self.writing * 4 < self.encoding else "fast"


Proof: TypeAlias = "Future[tuple[float, float]]"


@dataclass(frozen=True)
class _Prepared:
    item: Item
    encoded: Encoded | None
    base: int | None
    seconds: float


@dataclass(frozen=True)
class _Written:
    chunk: Chunk
    base: memoryview | None


class Packer:
    """Writes one pack. `peers` are digests that other ranks store."""

    def __init__(
        self, output: BinaryIO, sharing: Sharing, table: Table, peers: frozenset[str]
    ) -> None:
        self.encoding = 0.0
        self.writing = 0.0
        self.raw = 0
        self._output = output
        self._sharing = sharing
        self._table = table
        self._peers = peers
        self._window: list[_Written] = []
        self._window_bytes = 0

    def write(
        self, items: Iterable[Item], pool: Executor, effort: Effort, check: Callable[[], None]
    ) -> dict[tuple[str, int], int]:
        """Write and prove all chunks; returns where in the table each item's chunk is.

        `check` is called now and then and may raise. Raises OSError, and CorruptCheckpoint when
        the storage gives back other bytes than it was given.
        """
        found: dict[tuple[str, int], int] = {}
        waiting: deque[Future[_Prepared]] = deque()

        def settle() -> None:
            check()
            prepared = waiting.popleft().result()
            item = prepared.item
            found[item.tensor, item.place] = self._place(prepared, prover, proofs)

        proofs: list[Proof] = []
        with ThreadPoolExecutor(1, thread_name_prefix="read-back") as prover:
            try:
                for item in items:
                    waiting.append(pool.submit(self._prepare, item, effort))
                    if len(waiting) > AHEAD:
                        settle()
                while waiting:
                    settle()
                self._prove_window(prover, proofs)
            finally:
                for late in waiting:
                    late.cancel()
            for proof in proofs:
                flushing, decoding = proof.result()
                self.writing += flushing
                self.encoding += decoding
        return found

    def _prepare(self, item: Item, effort: Effort) -> _Prepared:
        item = item if item.name else item.named()
        if self._sharing.identical(item.name) is not None or item.name in self._peers:
            return _Prepared(item, None, None, 0.0)
        began = time.thread_time()
        base = None
        if effort == "small":
            base = self._sharing.base(item.tensor, item.place, len(item.raw))
        encoded = codec.encode(item.raw, item.dtype, effort, base[1] if base else None)
        row = base[0] if base and encoded.based else None
        return _Prepared(item, encoded, row, time.thread_time() - began)

    def _place(
        self,
        prepared: _Prepared,
        prover: ThreadPoolExecutor,
        proofs: list[Proof],
    ) -> int:
        item, encoded, table = prepared.item, prepared.encoded, self._table
        known = table.find(item.name)
        if known is not None:
            return known
        same = self._sharing.identical(item.name)
        if same is not None:
            return table.take(same)
        if encoded is None:
            return table.peers(item.name, len(item.raw))
        began = time.perf_counter()
        self._output.write(encoded.data)
        self.writing += time.perf_counter() - began
        self.encoding += prepared.seconds
        self.raw += len(item.raw)
        index, chunk = table.own(
            item.name, len(item.raw), len(encoded.data), encoded.codec, prepared.base
        )
        base = None
        if prepared.base is not None:
            found = self._sharing.base(item.tensor, item.place, len(item.raw))
            base = found[1] if found else None
        self._window.append(_Written(chunk, base))
        self._window_bytes += chunk.stored
        if self._window_bytes >= WINDOW_BYTES:
            self._prove_window(prover, proofs)
        return index

    def _prove_window(self, prover: ThreadPoolExecutor, proofs: list[Proof]) -> None:
        self._output.flush()
        window, self._window, self._window_bytes = self._window, [], 0
        proofs.append(prover.submit(_prove, self._output, window))


def _prove(output: BinaryIO, window: list[_Written]) -> tuple[float, float]:
    """Flush the file, and read `window` back from the disk rather than from the page cache.

    Returns the seconds that flushing took, and those that decoding kept a processor busy.
    """
    began = time.perf_counter()
    os.fdatasync(output.fileno())
    seconds = time.perf_counter() - began
    decoding = 0.0
    if not window:
        return seconds, decoding
    start, last = window[0].chunk.offset, window[-1].chunk
    stored = memoryview(bytearray(CHUNK_BYTES))
    target = memoryview(bytearray(CHUNK_BYTES))
    with Path(output.name).open("rb", buffering=0) as file:
        os.posix_fadvise(
            file.fileno(), start, last.offset + last.stored - start, os.POSIX_FADV_DONTNEED
        )
        for written in window:
            chunk = written.chunk
            place = f"{output.name}: reading it back"
            view = stored[: chunk.stored]
            count = read_exactly(file.fileno(), view, chunk.offset)
            if count != chunk.stored:
                raise CorruptCheckpoint(
                    f"{place}: expected {chunk.stored} bytes at offset {chunk.offset}, found"
                    f" {count}"
                )
            raw = view
            if chunk.codec != codec.RAW:
                raw = target[: chunk.raw]
                busy = time.thread_time()
                try:
                    codec.decode(chunk.codec, view, raw, written.base)
                except CorruptCheckpoint as error:
                    raise CorruptCheckpoint(f"{place}: {error.message}") from None
                decoding += time.thread_time() - busy
            if (found := digest(raw)) != chunk.digest:
                raise CorruptCheckpoint(f"{place}: expected {chunk.digest}, found {found}")
    return seconds, decoding
