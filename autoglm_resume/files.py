"""The one way this package writes a file, and the one way it reads those of strangers.

Written: temporary name, flush, rename, flush the directory. Whoever dies between any two of these
steps leaves the old file or the new one, and at most a temporary file that the next sweep removes;
never half of either under the real name.

Read: regular files only, and none that is larger than what is meant can be. A named pipe would have
us wait for good, a device does something when it is opened, and a file of holes takes all memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def sync_directory(path: Path) -> None:
    """Make renames and removals in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class UnfitFile(OSError):
    """What is at a path is not read: it is no regular file, or larger than such a file can be."""


def opened(path: Path) -> int:
    """A descriptor of a regular file, to read. Raises UnfitFile for anything else, and OSError."""
    _require_regular(path, path.stat())  # before it is opened: a tape would rewind
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def reading(path: Path) -> BinaryIO:
    """A regular file, open to read. Raises UnfitFile for anything else, and OSError."""
    return os.fdopen(opened(path), "rb")


def read(path: Path, most: int) -> bytes:
    """All of a regular file of `most` bytes at most. Raises UnfitFile, and OSError."""
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        found = f"expected at most {most} bytes, found {max(size, len(data))}"
        raise UnfitFile(errno.EFBIG, found, str(path))
    return data


def _require_regular(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        found = _KINDS.get(kind, "something else")
        raise UnfitFile(errno.EINVAL, f"expected a regular file, found {found}", str(path))


@contextlib.contextmanager
def writing(
    path: Path, *, replace: bool = True, durable: bool = True, private: bool = False
) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends, and vanishes if it raises.

    With `durable=False` it survives the death of this process but not of the machine, and a busy
    disk delays nobody: for files that nothing needs after a reboot.

    With `replace=False` an existing `path` wins and FileExistsError is raised: a hard link,
    unlike a rename, cannot overwrite.

    A `private` file is its owner's alone, from the first byte on; others are as the umask says.
    """
    # A pid alone is not unique where containers share a disk.
    temporary = path.with_name(f"{TEMPORARY}{os.urandom(4).hex()}-{path.name}")
    try:
        mode = 0o600 if private else 0o666
        with open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
            temporary.unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def prove_writable(directory: Path) -> None:
    """Make it, and write a byte to it that leaves nothing behind. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"\0")
        probe.flush()
        os.fsync(probe.fileno())


def write(
    path: Path,
    data: bytes,
    *,
    replace: bool = True,
    durable: bool = True,
    private: bool = False,
) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new; see `writing`."""
    with writing(path, replace=replace, durable=durable, private=private) as file:
        file.write(data)


def read_ahead(paths: Iterable[Path]) -> None:
    """Have the kernel read `paths` into memory, and return at once; what fails is read later."""

    def begin() -> None:
        for path in paths:
            with contextlib.suppress(OSError), reading(path) as file:
                # The call itself takes as long as it takes to find the memory.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=begin, name="read ahead", daemon=True).start()
