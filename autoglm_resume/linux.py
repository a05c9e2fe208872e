"""The few Linux calls that Python does not wrap, or not well: prctl, inotify, madvise."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

NICE = 19
GROUP_NICE = 10
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MADV_POPULATE_WRITE = 23
_IN_MODIFY = 0x2
_IN_CREATE = 0x100
_IN_MOVED_TO = 0x80
_EVENT = struct.Struct("iIII")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def adopt_orphans(*, adopt: bool = True) -> None:
    """Make this process the parent of orphaned descendants, so that it can reap them; or stop."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send signal `number` to this process when its parent dies.

    The kernel ties this to whoever is the parent *now*, so a parent that died before the call is
    found by comparing: the process then ends itself at once.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def stand_back() -> None:
    """Give this process, which should lead a session of its own, low priority.

    Where the kernel groups processes by session (autogroup, most desktops and servers), niceness
    only counts within a session, and the group has one of its own. There it is not the lowest:
    beside ranks that use every core, a saver at 19 would get a hundredth of one.
    """
    os.nice(NICE)
    set_group_nice(GROUP_NICE)


def set_group_nice(nice: int) -> None:
    """The niceness of this process's session, if it leads one of its own and the kernel does so."""
    if os.getsid(0) != os.getpid():
        return  # the group is also that of others
    for _ in range(3):  # others than root may only do so ten times a second
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
        except BlockingIOError:
            time.sleep(0.15)
        except OSError:
            return  # a kernel without it
        else:
            return


def populate(address: int, size: int) -> None:
    """Put the pages that these bytes are in into this process's page table, writable.

    A kernel before 5.14 does nothing; then, as without memory for it, they come when touched.
    """
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    length = ctypes.c_size_t(address + size - begin)
    _libc.madvise(ctypes.c_void_p(begin), length, _MADV_POPULATE_WRITE)


class DirectoryWatch:
    """Readable (for a selector) whenever a file in a watched directory is created or grows."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_init1: {os.strerror(number)}")

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._fd

    def add(self, directory: Path) -> int:
        """Watch `directory`; returns a handle for `remove`."""
        handle: int = _libc.inotify_add_watch(
            self._fd, os.fsencode(directory), _IN_MODIFY | _IN_CREATE | _IN_MOVED_TO
        )
        if handle < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_add_watch: {os.strerror(number)}", str(directory))
        return handle

    def remove(self, handle: int) -> None:
        """Stop watching."""
        _libc.inotify_rm_watch(self._fd, handle)

    def changed(self) -> Iterator[str]:
        """Names of the files that changed since the last call; each may come up several times."""
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(data):
                _, _, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                yield os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
                offset += length

    def close(self) -> None:
        """Release the descriptor; nobody waits for that, since the kernel takes 16 ms for it."""
        threading.Thread(target=os.close, args=(self._fd,)).start()
