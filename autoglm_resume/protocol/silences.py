"""How long a rank was silent between two beats, by phase: a histogram in shared memory.

A silence of n nanoseconds counts in a bucket of half an octave; adding one is an increment of an
aligned word, so that a reader in another process sees each count before or after, never torn.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

BUCKETS = 128
PHASES = 16
"""Room for as many."""
_WORD = struct.Struct("<I")
_SUM = struct.Struct("<Q")
_SUMS = PHASES * BUCKETS * _WORD.size
SIZE = _SUMS + PHASES * _SUM.size
"""Bytes of one rank's."""

Counts = dict[int, int]
"""Silences by bucket."""


def bucket(nanoseconds: int) -> int:
    """The bucket of a silence: two to each power of two."""
    bits = nanoseconds.bit_length()
    return bits * 2 + (nanoseconds >> (bits - 2) & 1) if bits > 1 else bits * 2


def longest(of: int) -> float:
    """Seconds of the longest silence that counts in bucket `of`."""
    bits, half = divmod(of, 2)
    return float((1 << bits) - 1 if half or bits < 2 else 3 << (bits - 2)) / 1e9


class SilenceHistogram:
    """One rank's histogram, at `offset` of writable `memory`."""

    def __init__(self, memory: memoryview, offset: int) -> None:
        self._counts = memory[offset : offset + _SUMS].cast("I")
        self._sums = memory[offset + _SUMS : offset + SIZE].cast("Q")

    def add(self, phase: int, nanoseconds: int) -> None:
        """The rank was silent in `phase` for so long."""
        self._counts[phase * BUCKETS + bucket(nanoseconds)] += 1
        self._sums[phase] += nanoseconds

    def counts(self, phase: int) -> Counts:
        """Silences in `phase` so far."""
        words = self._counts[phase * BUCKETS : (phase + 1) * BUCKETS].tolist()
        return {at: count for at, count in enumerate(words) if count}

    def seconds(self, phase: int) -> float:
        """Seconds spent in `phase` so far."""
        return self._sums[phase] / 1e9

    def all(self) -> dict[int, Counts]:
        """Silences in every phase that had some."""
        found = {phase: self.counts(phase) for phase in range(PHASES)}
        return {phase: counts for phase, counts in found.items() if counts}

    def release(self) -> None:
        """Give the memory back, which cannot be unmapped before."""
        self._counts.release()
        self._sums.release()


def merged(several: Iterable[Mapping[int, Counts]]) -> dict[int, Counts]:
    """The sum of histograms."""
    total: dict[int, Counts] = {}
    for one in several:
        for phase, counts in one.items():
            into = total.setdefault(phase, {})
            for at, count in counts.items():
                into[at] = into.get(at, 0) + count
    return total
