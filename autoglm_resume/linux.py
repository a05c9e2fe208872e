"""The few Linux calls that Python does not wrap, or not well: prctl, inotify, timerfd, madvise."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

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
_TIMES = struct.Struct("llll")
_USED_UP = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM})
"""What inotify fails with where a limit of the machine is reached."""
LOOK = 0.1
"""Seconds between looks at a directory that inotify cannot watch."""

_Files: TypeAlias = "dict[str, tuple[int, int, int]]"


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


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at `path`, or where it will be made. Raises OSError."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class DirectoryWatch:
    """Readable (for a selector) whenever a file in a watched directory is created or grows.

    A user has few inotify instances, often 128, for all that runs in his name. Where none is left,
    or no watch, this is readable every LOOK seconds, and finds what has changed by looking.
    """

    def __init__(self) -> None:
        self._ready = select.epoll()
        self._inotify: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._timer = -1
        self._looks: dict[int, tuple[Path, _Files]] = {}
        """What is looked at, and how it was last time."""
        if self._inotify >= 0:
            self._ready.register(self._inotify, select.EPOLLIN)
        elif (number := ctypes.get_errno()) not in _USED_UP:
            self._ready.close()
            raise OSError(number, f"inotify_init1: {os.strerror(number)}")

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._ready.fileno()

    def add(self, directory: Path) -> int:
        """Watch `directory`; returns a handle for `remove`. Raises OSError if it is not there."""
        if self._inotify >= 0:
            handle: int = _libc.inotify_add_watch(
                self._inotify, os.fsencode(directory), _IN_MODIFY | _IN_CREATE | _IN_MOVED_TO
            )
            if handle >= 0:
                return handle
            if (number := ctypes.get_errno()) not in _USED_UP:
                raise OSError(number, f"inotify_add_watch: {os.strerror(number)}", str(directory))
        handle = min(self._looks, default=0) - 1
        self._looks[handle] = directory, _files(directory)
        if self._timer < 0:
            self._timer = _ticking(LOOK)
            self._ready.register(self._timer, select.EPOLLIN)
        return handle

    def remove(self, handle: int) -> None:
        """Stop watching."""
        if self._looks.pop(handle, None) is None:
            _libc.inotify_rm_watch(self._inotify, handle)

    def changed(self) -> Iterator[str]:
        """Names of the files that changed since the last call; each may come up several times."""
        for data in _readable(self._inotify):
            offset = 0
            while offset < len(data):
                _, _, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                yield os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
                offset += length
        list(_readable(self._timer))
        for handle, (directory, before) in list(self._looks.items()):
            now: _Files = {}
            with contextlib.suppress(FileNotFoundError):
                now = _files(directory)
            self._looks[handle] = directory, now
            yield from (name for name in now if now[name] != before.get(name))

    def close(self) -> None:
        """Release the descriptors; nobody waits for inotify's, for which the kernel takes 16 ms."""
        self._ready.close()
        if self._timer >= 0:
            os.close(self._timer)
        if self._inotify >= 0:
            threading.Thread(target=os.close, args=(self._inotify,)).start()


def _files(directory: Path) -> _Files:
    """What of each file of `directory` changes when it grows, or another takes its place."""
    files: _Files = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                files[entry.name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return files


def _ticking(seconds: float) -> int:
    """A descriptor that is readable every so many seconds."""
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
    nanoseconds = int(seconds * 1e9)
    if fd < 0 or _libc.timerfd_settime(fd, 0, _TIMES.pack(*[0, nanoseconds] * 2), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"timerfd: {os.strerror(number)}")
    return fd


def _readable(fd: int) -> Iterator[bytes]:
    """What can be read without waiting; nothing of a descriptor that is not there."""
    while fd >= 0:
        try:
            yield os.read(fd, 65536)
        except BlockingIOError:
            return
