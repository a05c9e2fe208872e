"""Files past the page cache: copying into it and out again is most of what a save would cost.

It also is what proves a file: what is read here was read from the storage. Where the file system
has no such way (some in memory, some on networks), the page cache is used, and dropped for that.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import Buffer

T = TypeVar("T")

BLOCK = 4096
"""Offsets, lengths and addresses are multiples of it: as much as common file systems ask for."""
BUFFER_BYTES = 4 << 20


def _memory(size: int) -> memoryview:
    """Whole pages."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class _File:
    """An open file, past the page cache as long as the file system takes that."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.direct = False
        self._set(True)

    def through_cache(self) -> None:
        """From now on."""
        if self.direct:
            self._set(False)

    def tried(self, operation: Callable[[], T]) -> T:
        """What it returns, done once more if only the way past the cache was refused."""
        try:
            return operation()
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
        self.through_cache()
        return operation()

    def _set(self, direct: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            self.direct = direct


class Output:
    """Appends to the new file that is open as `fd`, and has nothing in it yet."""

    def __init__(self, fd: int) -> None:
        self.end = 0
        """Bytes that are in the file. They are on the disk after the next fdatasync."""
        self._file = _File(fd)
        self._buffer = _memory(BUFFER_BYTES)
        self._filled = 0

    def write(self, data: Buffer) -> None:
        """Raises OSError."""
        rest = memoryview(data)
        while rest:
            take = min(len(rest), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + take] = rest[:take]
            self._filled += take
            rest = rest[take:]
            if self._filled == len(self._buffer):
                self._put(self._buffer)
                self._filled = 0

    def finish(self) -> None:
        """Put the rest into the file; nothing may follow. Raises OSError."""
        blocks = self._filled // BLOCK * BLOCK
        self._put(self._buffer[:blocks])
        if blocks < self._filled:
            self._file.through_cache()
            self._put(self._buffer[blocks : self._filled])
        self._filled = 0

    def _put(self, data: memoryview) -> None:
        while data:
            count = self._file.tried(lambda rest=data: os.write(self._file.fd, rest))  # type: ignore[misc]
            self.end += count
            data = data[count:]


class Input:
    """Reads a file from the storage, not from the page cache, at most `largest` bytes at once."""

    def __init__(self, path: Path, largest: int) -> None:
        """Raises OSError."""
        self._file = _File(files.opened(path))
        self._buffer = _memory((largest // BLOCK + 2) * BLOCK)

    def close(self) -> None:
        """Give up the descriptor."""
        os.close(self._file.fd)

    def read(self, offset: int, size: int) -> memoryview:
        """These bytes, which were flushed, until the next read; fewer at the file's end.

        Raises OSError.
        """
        start = offset // BLOCK * BLOCK
        length = -(-(offset + size) // BLOCK) * BLOCK - start
        done = self._file.tried(lambda: self._fill(start, length))
        return self._buffer[offset - start : max(offset - start, min(offset - start + size, done))]

    def _fill(self, start: int, length: int) -> int:
        # Some file systems take the flag and use the cache all the same. Only what was flushed can
        # be dropped from it.
        os.posix_fadvise(self._file.fd, start, length, os.POSIX_FADV_DONTNEED)
        done = 0
        while done < length:
            count = os.preadv(self._file.fd, [self._buffer[done:length]], start + done)
            done += count
            # The last block of a file is not whole, and an offset within it would be refused.
            if count == 0 or done % BLOCK:
                break
        return done
