"""A saver outlives its script, and a script that is started again waits for what it still writes.

Under a supervisor nobody needs this: it asks its savers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from autoglm_resume import files, output


@contextlib.contextmanager
def persisting(root: Path) -> Iterator[None]:
    """While something is written or deleted below `root`; any number of processes at a time."""
    with contextlib.suppress(OSError):  # the save itself will say what is wrong
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            files.sync_directory(root.parent)
    with _locked(root, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def settled(root: Path) -> Iterator[None]:
    """While nobody does, after waiting for that."""
    with _locked(root, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    fd = -1
    # Where there is no such directory, or no such lock (some network file systems): go on without.
    with contextlib.suppress(OSError):
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if how == fcntl.LOCK_EX:
                output.say(f"{root}: waiting for the last process's save")
            fcntl.flock(fd, how)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)
