"""Chunks into a pack: share, encode and write, and prove what was written, all at once.

While one window of the pack is encoded and written, the ones before are flushed to the disk, read
from there again and decoded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from autoglm_resume.checkpoint.chunks import codec, read_back
from autoglm_resume.checkpoint.chunks.codec import Effort, Encoded
from autoglm_resume.checkpoint.chunks.compression import Throughput
from autoglm_resume.checkpoint.chunks.cut import Item
from autoglm_resume.checkpoint.chunks.direct_io import Output
from autoglm_resume.checkpoint.chunks.read_back import Proof, Prover, Written
from autoglm_resume.checkpoint.format.options import Compress
from autoglm_resume.checkpoint.write.reuse import ChunkTable, Sharing

THREADS = 2
WINDOW_BYTES = 16 << 20
AHEAD = 16
"""Chunks that are encoded before they are written."""


@dataclass(frozen=True)
class _Prepared:
    item: Item
    encoded: Encoded | None
    base: int | None
    compressing: float
    """Seconds of a processor; none where it was not tried."""


class Packer:
    """Writes one pack into the new file `output`. `peers` are digests that other ranks store.

    `throughput` says how hard to compress, and is told what it took.
    """

    def __init__(
        self,
        output: BinaryIO,
        sharing: Sharing,
        table: ChunkTable,
        peers: frozenset[str],
        throughput: Throughput,
    ) -> None:
        self._file = output
        self._output = Output(output.fileno())
        self._sharing = sharing
        self._table = table
        self._peers = peers
        self._throughput = throughput
        self._window: list[Written] = []
        self._writing = 0.0
        """Seconds, since something was learned."""

    def write(
        self, items: Iterable[Item], pool: Executor, compress: Compress, check: Callable[[], None]
    ) -> dict[tuple[str, int], int]:
        """Write and prove all chunks; returns where in the table each item's chunk is.

        `check` is called now and then and may raise. Raises OSError, and CorruptCheckpoint when
        the storage gives back other bytes than it was given.
        """
        found: dict[tuple[str, int], int] = {}
        waiting: deque[Future[_Prepared]] = deque()

        with closing(Prover(self._file)) as prover:

            def settle() -> None:
                check()
                prepared = waiting.popleft().result()
                item = prepared.item
                found[item.position] = self._enter(prepared)
                if self._window and self._output.end - self._window[0].chunk.offset >= WINDOW_BYTES:
                    self._prove(prover)
                self._learn(prover.proofs(wait=False))

            try:
                for nth, item in enumerate(items):
                    effort = self._throughput.effort(compress, nth)
                    waiting.append(pool.submit(self._prepare, item, effort))
                    if len(waiting) > AHEAD:
                        settle()
                while waiting:
                    settle()
            finally:
                for late in waiting:
                    late.cancel()
            began = time.perf_counter()
            self._output.finish()
            self._writing += time.perf_counter() - began
            self._prove(prover)
            for proof in prover.proofs(wait=True):
                check()
                self._learn([proof])
        return found

    def _prepare(self, item: Item, effort: Effort) -> _Prepared:
        item = item if item.name else item.named()
        if self._sharing.identical(item.name) is not None or item.name in self._peers:
            return _Prepared(item, None, None, 0.0)
        began = time.thread_time()
        base = None
        if effort == "small":
            base = self._sharing.base(item.tensor, item.index, len(item.raw))
        encoded = codec.encode(item.raw, item.dtype, effort, base[1] if base else None)
        row = base[0] if base and encoded.based else None
        seconds = 0.0 if effort == "off" else time.thread_time() - began
        return _Prepared(item, encoded, row, seconds)

    def _enter(self, prepared: _Prepared) -> int:
        item, encoded, table = prepared.item, prepared.encoded, self._table
        known = table.find(item.name)
        if known is not None:
            return known
        same = self._sharing.identical(item.name)
        if same is not None:
            return table.take(same)
        if encoded is None:
            return table.peers(item.name, len(item.raw))
        self._throughput.encoding.add(len(item.raw) * THREADS, prepared.compressing)
        began = time.perf_counter()
        self._output.write(encoded.data)
        self._writing += time.perf_counter() - began
        index, chunk = table.own(
            item.name, len(item.raw), len(encoded.data), encoded.codec, prepared.base
        )
        base = None
        if prepared.base is not None:
            found = self._sharing.base(item.tensor, item.index, len(item.raw))
            base = found[1] if found else None
        self._window.append(Written(chunk, base))
        return index

    def _prove(self, prover: Prover) -> None:
        window = [written for written in self._window if written.end <= self._output.end]
        self._window = self._window[len(window) :]
        prover.begin(window)

    def _learn(self, proofs: Iterable[Proof]) -> None:
        for proof in proofs:
            writing, self._writing = self._writing, 0.0
            self._throughput.writing.add(proof.stored, writing + proof.flushing)
            self._throughput.reading.add(proof.stored * read_back.THREADS, proof.reading)
            self._throughput.decoding.add(proof.decoded * read_back.THREADS, proof.decoding)
