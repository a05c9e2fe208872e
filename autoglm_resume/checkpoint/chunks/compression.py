"""How hard to compress: what pays here, from what it took so far. Pure."""

from __future__ import annotations

from autoglm_resume.checkpoint.chunks.codec import Effort
from autoglm_resume.checkpoint.format.options import Compress

HEADROOM = 2
"""How many times as fast as the storage compression has to be: training needs processors too."""
SAMPLE = 8
"""Chunks of the first pack that are compressed to see how fast that is."""
_KEPT = 0.8
"""Of what earlier measurements weigh, at every new one."""


class Rate:
    """Bytes per second, of late."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        """`count` bytes took that long; nothing of either says nothing."""
        if count and seconds > 0:
            self._bytes = self._bytes * _KEPT + count
            self._seconds = self._seconds * _KEPT + seconds

    @property
    def time(self) -> float | None:
        """Seconds per byte; None before anything was measured."""
        return self._seconds / self._bytes if self._bytes else None


class Throughput:
    """How fast this machine encodes and decodes, and this storage takes and gives back bytes.

    Codecs are counted in raw bytes, the storage in stored ones; each with all its threads at work.
    """

    def __init__(self) -> None:
        self.encoding = Rate()
        self.decoding = Rate()
        self.writing = Rate()
        """And flushing."""
        self.reading = Rate()

    def effort(self, compress: Compress, nth: int) -> Effort:
        """For the `nth` chunk of a pack.

        `auto` compresses where neither a save nor a load can become slower by it than the storage
        is for raw bytes: a save encodes and, to prove what it wrote, decodes while it writes; a
        load decodes while it reads. Before all that is known, the first chunks are compressed and
        the others are not. It never takes differences: loading them means to read the checkpoints
        before, too, which is slower on any storage.
        """
        if compress != "auto":
            return compress
        encoding, decoding = self.encoding.time, self.decoding.time
        writing, reading = self.writing.time, self.reading.time
        if encoding is None or decoding is None:
            return "fast" if nth < SAMPLE else "off"
        if writing is None or reading is None:
            return "off"
        pays = writing > (encoding + decoding) * HEADROOM and reading > decoding * HEADROOM
        return "fast" if pays else "off"
