"""Who has a run, or a directory of checkpoints: locks that the kernel frees with their holders.

A supervisor has both alone. Without one, the ranks of a launch have the directory together: the
first takes it alone, writes down who they are, and then lets the others in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoglm_resume import files, output
from autoglm_resume.errors import RunLocked

CHECKPOINTS = ".lock"
"""In a directory of checkpoints: held while somebody trains with it."""

_WHOLE_FILE = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""
_BOARD = re.compile(r"/proc/\d+/fd/\d+")
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What file systems and containers say that have no such lock."""
_FLOCK = {fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_RDLCK: fcntl.LOCK_SH}


@dataclass(frozen=True)
class Holder:
    """Who has a run, or the checkpoints."""

    pid: int
    host: str
    since: float
    """Unix seconds."""
    board: str = ""
    """Path of the present attempt's heartbeat board."""
    run: str = ""
    """Directory of the run whose checkpoints are held; a script without a supervisor asks for it
    (see worker/run_beside.py)."""
    command: str = ""
    """What trains without a supervisor; `pid` is then its rank 0."""

    @classmethod
    def here(cls, **more: str) -> Holder:
        """This process, from now on."""
        return cls(os.getpid(), socket.gethostname(), time.time(), **more)

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        except (ValueError, OverflowError, OSError):
            since = "an unknown time"
        what = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}{what}, since {since}"


@dataclass
class Lock:
    """The lock this process holds."""

    fd: int
    run: str = ""
    problem: str = ""
    """Why it is none: the file system has no locks."""

    def describe(self, board: str) -> None:
        """Tell other commands who holds it and where the heartbeats are."""
        self.write(Holder.here(board=board, run=self.run))

    def write(self, holder: Holder) -> None:
        """Tell whoever asks; what can not be written is not known."""
        data = json.dumps(asdict(holder)).encode()
        with contextlib.suppress(OSError):
            os.pwrite(self.fd, data, 0)
            os.ftruncate(self.fd, len(data))


@contextlib.contextmanager
def held(path: Path, run: str = "") -> Iterator[Lock]:
    """Hold the lock in `path` alone. Raises RunLocked while anybody else has it."""
    fd = _opened(path)
    try:
        problem = _taken(fd, fcntl.F_WRLCK, path)
        lock = Lock(fd, run or read_holder(fd).run, problem)
        lock.describe("")
        yield lock
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked_checkpoints(directory: Path, run: Path | None = None) -> Iterator[Lock]:
    """Hold a checkpoint directory, which two runs must never write to at once.

    It then says which `run` it is of; without one, what it said.
    """
    with held(directory / CHECKPOINTS, str(run or "")) as lock:
        yield lock


def holder(path: Path) -> Holder | None:
    """Who has the lock in `path` now, None if nobody; asking takes it from nobody."""
    try:
        with files.reading(path) as file:
            question = _WHOLE_FILE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            who = read_holder(file.fileno())
            try:
                answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, question)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return who if _lives(who) else None
            return who if _WHOLE_FILE.unpack(answer)[0] != fcntl.F_UNLCK else None
    except FileNotFoundError:
        return None


# Without a supervisor: for as long as the process lives

_mine: dict[Path, Lock] = {}
"""What this process has, by directory."""


def train_first(directory: Path, command: str) -> str:
    """Hold the checkpoints in `directory` for this process and the other ranks of its launch.

    Returns why that is not possible here, if so. Raises RunLocked while anybody else has them, and
    OSError where nothing can be written.
    """
    if _is_mine(directory):
        return ""
    path = directory / CHECKPOINTS
    fd = _opened(path)
    try:
        problem = _taken(fd, fcntl.F_WRLCK, path)
        lock = Lock(fd, read_holder(fd).run, problem)
        lock.write(replace(Holder.here(run=lock.run), command=command))
        if not problem:
            _taken(fd, fcntl.F_RDLCK, path)  # at once, so that nobody comes in between
    except BaseException:
        os.close(fd)
        raise
    _mine[directory] = lock
    return problem


def train_too(directory: Path) -> None:
    """Share what this launch's rank 0 holds. Raises RunLocked if another launch has it by now."""
    if _is_mine(directory):
        return
    path = directory / CHECKPOINTS
    fd = _opened(path)
    try:
        problem = _taken(fd, fcntl.F_RDLCK, path)
    except BaseException:
        os.close(fd)
        raise
    _mine[directory] = Lock(fd, problem=problem)


def leave(directory: Path) -> None:
    """Let others have it: this process will not train after all."""
    if (lock := _mine.pop(directory, None)) is not None:
        os.close(lock.fd)


def _is_mine(directory: Path) -> bool:
    lock = _mine.get(directory)
    if lock is None:
        return False
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(lock.fd), (directory / CHECKPOINTS).stat()):
            return True
    leave(directory)  # the directory was moved away, and is another one by now
    return False


def _forget_in_child() -> None:
    """A fork, such as a DataLoader's worker, may outlive what trains."""
    for lock in _mine.values():
        with contextlib.suppress(OSError):
            os.close(lock.fd)
    _mine.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _taken(fd: int, how: int, path: Path) -> str:
    """Take the lock, or change what is held of it; returns why there is none, if so."""
    try:
        try:
            # Unlike flock, a lock of an open file description can be asked about without taking it:
            # `status` must never make a starting run believe that it has a rival.
            wish = _WHOLE_FILE.pack(how, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wish)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            fcntl.flock(fd, _FLOCK[how] | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _refusal(path.parent, read_holder(fd)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return f"{path}: this file system has no locks ({error.strerror})"
    return ""


def _refusal(directory: Path, who: Holder) -> RunLocked:
    if who.command:
        return RunLocked(
            f"{directory}: another launch trains with these checkpoints: {who}",
            hint="wait until all its ranks have ended, or give this one a directory of its own:"
            " autoglm.init(checkpoint_dir=…); if both are ranks of one, set RANK and WORLD_SIZE",
        )
    return RunLocked(
        f"{directory}: another supervisor has it: {who}",
        hint=f"wait for it, or end it with: {output.command('stop', who.run or directory)}",
    )


def read_holder(fd: int) -> Holder:
    """What the last holder of a lock has written."""
    try:
        found = json.loads(os.pread(fd, 4096, 0))
        pid, since = int(found["pid"]), float(found["since"])
        names = ("host", "board", "run", "command")
        host, board, run, command = (str(found.get(name, "")) for name in names)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return Holder(0, "unknown", 0.0)
    # Whoever looks at a run opens its board: never any file that a lock may name.
    return Holder(pid, host, since, board if _BOARD.fullmatch(board) else "", run, command)


def _lives(who: Holder) -> bool:
    return who.host == socket.gethostname() and Path(f"/proc/{who.pid}").exists()
