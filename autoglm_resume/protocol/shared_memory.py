"""Shared memory that snapshots lie in: an anonymous file of the saver, mapped by its rank.

Nothing of it is left behind, whoever dies: it has no name, and the kernel takes it back with the
last process that has it open.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from autoglm_resume import linux

MARGIN = 0.9
"""Of the memory that is free, what slots may take."""
_UNLIMITED = 1 << 60


class Slots:
    """`count` slots of `size` bytes each."""

    def __init__(self, fd: int, size: int, count: int) -> None:
        self.fd = fd
        self.size = size
        self.count = count
        self.memory = mmap.mmap(fd, size * count)
        self._view = memoryview(self.memory)

    @classmethod
    def create(cls, size: int, count: int) -> Slots:
        """New slots, of zeros, every page of them allocated now. Raises OSError without room."""
        fd = os.memfd_create("autoglm-snapshots", os.MFD_CLOEXEC)
        try:
            # The first touch of shared memory costs four times what a copy into it does.
            os.posix_fallocate(fd, 0, size * count)
            return cls(fd, size, count)
        except BaseException:
            os.close(fd)
            raise

    def touch(self) -> None:
        """Put all pages into this process's page table ahead of time."""
        # Not mmap.madvise, which holds the interpreter's lock for all that time.
        linux.populate(ctypes.addressof(ctypes.c_char.from_buffer(self._view)), len(self._view))

    def view(self, slot: int) -> memoryview:
        """One slot, writable."""
        return self._view[slot * self.size : (slot + 1) * self.size]

    def close(self) -> None:
        """Give up the descriptor; the memory goes when nothing uses its views any more."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self._view.release()
            self.memory.close()


def slots_fitting(size: int, count: int, lock: int) -> tuple[Slots | None, str]:
    """New slots, as many as there is room for, and why not all.

    `lock` is a descriptor of the same file for all savers of a machine: they must take their memory
    one after the other, or all would count on the same.
    """
    with _locked(lock):
        free = int(room() * MARGIN)
        fitting = min(count, free // max(size, 1))
        reason = ""
        if fitting < count:
            reason = (
                f"{count} slots of {size:,} bytes were asked for, there is room for {fitting}:"
                f" {free:,} bytes"
            )
        if not fitting:
            return None, reason
        try:
            return Slots.create(size, fitting), reason
        except OSError as error:
            return None, f"{fitting} slots of {size:,} bytes: {error.strerror}"


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    with contextlib.suppress(OSError):  # a terminal or a pipe has no lock
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def room() -> int:
    """Bytes that this machine or container could still give to shared memory."""
    return min(psutil.virtual_memory().available, _room_in_cgroup())


def _room_in_cgroup() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split(":", 2)[2]
        home = Path("/sys/fs/cgroup") / group.lstrip("/")
        for directory in (home, Path("/sys/fs/cgroup")):
            if (directory / "memory.max").exists():
                limit = (directory / "memory.max").read_text().strip()
                if limit != "max":
                    return int(limit) - int((directory / "memory.current").read_text())
    return _UNLIMITED
