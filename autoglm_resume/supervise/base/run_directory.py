"""A run's directory: journal, job, one folder per attempt, and the lock of its supervisor.

runs/NAME/
  job.json            the job as it was last started, every default filled in
  events.jsonl        the journal
  lock                held by the supervisor while it lives; says who it is
  attempts/000/       rank-N.log, rank-N.events.jsonl, rank-N.error.json, assignment.json
  checkpoints/        unless the job puts them elsewhere
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import files, journal
from autoglm_resume.errors import RunLocked, UsageError
from autoglm_resume.events import Event, RunStarted
from autoglm_resume.protocol.assignment import LARGEST_JOB
from autoglm_resume.protocol.relocation import relocated

_WHOLE_FILE = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""
_BOARD = re.compile(r"/proc/\d+/fd/\d+")


@dataclass(frozen=True)
class Holder:
    """The supervisor that has a run."""

    pid: int
    host: str
    since: float
    """Unix seconds."""
    board: str = ""
    """Path of the present attempt's heartbeat board."""
    run: str = ""
    """Directory of the run whose checkpoints are held; a script without a supervisor asks for it
    (see worker/run_beside.py)."""


class RunDirectory:
    """One run, by its directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "events.jsonl"
        self.attempts = path / "attempts"
        self._job = path / "job.json"
        self._lock = path / "lock"

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self._job.exists()

    def attempt(self, number: int) -> Path:
        """Directory of one attempt."""
        return self.attempts / f"{number:03d}"

    def next_attempt(self) -> int:
        """A number larger than that of every attempt that has a directory here."""
        names = [path.name for path in self.attempts.glob("[0-9]*")]
        return max((int(name) for name in names if name.isdecimal()), default=-1) + 1

    def events(self) -> list[Event]:
        """The whole journal."""
        return journal.read(self.journal)

    def save_job(self, job: dict[str, Any]) -> None:
        """Keep the resolved job, so that the run can be resumed from its directory alone.

        Only for its owner: the environment of the ranks is in it, with the keys that they need.
        """
        files.write(self._job, json.dumps(job, indent=1).encode() + b"\n", private=True)

    def job(self) -> dict[str, Any]:
        """The job as it was last started, with the run's own paths as they are now."""
        return relocated(self.recorded_job(), self.path)

    def recorded_job(self) -> dict[str, Any]:
        """The same as it was written, before the directory was moved or copied, if it was."""
        try:
            job = json.loads(files.read(self._job, LARGEST_JOB))
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: no run was started here (no {self._job.name})"
            ) from None
        except files.UnfitFile as error:
            raise UsageError(f"{self._job}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self._job}: expected JSON, found: {error}") from None
        if not isinstance(job, dict):
            raise UsageError(f"{self._job}: expected a JSON object")
        return job

    def shown_job(self) -> dict[str, Any]:
        """The same to look at: for another user as it was journaled, without what is secret."""
        try:
            return self.job()
        except PermissionError:
            told = (event.job for event in self.events() if isinstance(event, RunStarted))
            return relocated(next((job for job in told if isinstance(job, dict)), {}), self.path)

    def section(self, name: str) -> Mapping[str, Any]:
        """One of the job to look at, which may be of another version, or damaged."""
        found = self.shown_job().get(name)
        return found if isinstance(found, Mapping) else {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Hold the run. Raises RunLocked while another process does; a dead process cannot."""
        with _held(self._lock) as lock:
            yield lock

    def holder(self) -> Holder | None:
        """Who has the run now, None if nobody."""
        try:
            with files.reading(self._lock) as file:
                question = _WHOLE_FILE.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
                answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, question)
                if _WHOLE_FILE.unpack(answer)[0] != fcntl.F_UNLCK:
                    return _read_holder(file.fileno())
        except FileNotFoundError:
            pass
        return None


@dataclass
class Lock:
    """The lock this process holds."""

    fd: int
    run: str = ""

    def describe(self, board: str) -> None:
        """Tell other commands who holds it and where the heartbeats are."""
        holder = Holder(os.getpid(), socket.gethostname(), time.time(), board, self.run)
        data = json.dumps(asdict(holder)).encode()
        with contextlib.suppress(OSError):
            os.pwrite(self.fd, data, 0)
            os.ftruncate(self.fd, len(data))


@contextlib.contextmanager
def locked_checkpoints(directory: Path, run: Path | None = None) -> Iterator[None]:
    """Hold a checkpoint directory, which two runs must never write to at once.

    It then says which `run` it is of; without one, what it said.
    """
    with _held(directory / ".lock", str(run or "")):
        yield


def last_run(checkpoints: Path) -> Path | None:
    """The directory of the run that had this directory of checkpoints last, if that is known."""
    with contextlib.suppress(OSError, ValueError), (checkpoints / ".lock").open("rb") as file:
        run = _read_holder(file.fileno()).run
        return Path(run) if run else None
    return None


@contextlib.contextmanager
def undisturbed(run: RunDirectory | None, checkpoints: Path) -> Iterator[None]:
    """While no supervisor has `checkpoints`, or the run they are of. Raises RunLocked."""
    with contextlib.ExitStack() as held:
        if run is not None:
            held.enter_context(run.locked())
        held.enter_context(locked_checkpoints(checkpoints, run.path if run else None))
        yield


@contextlib.contextmanager
def _held(path: Path, run: str = "") -> Iterator[Lock]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            # Unlike flock, a lock of an open file description can be asked about without taking it:
            # `status` must never make a starting run believe that it has a rival.
            wish = _WHOLE_FILE.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wish)
        except (BlockingIOError, PermissionError):
            raise RunLocked(
                f"{path.parent}: another supervisor has it: {_sentence(_read_holder(fd))}",
                hint="wait for it, or end it with: autoglm stop",
            ) from None
        lock = Lock(fd, run or _read_holder(fd).run)
        lock.describe("")
        yield lock
    finally:
        os.close(fd)


def _read_holder(fd: int) -> Holder:
    try:
        found = json.loads(os.pread(fd, 4096, 0))
        pid, since = int(found["pid"]), float(found["since"])
        host, board, run = (str(found.get(name, "")) for name in ("host", "board", "run"))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return Holder(0, "unknown", 0.0)
    # Whoever looks at a run opens its board: never any file that a lock may name.
    return Holder(pid, host, since, board if _BOARD.fullmatch(board) else "", run)


def _sentence(holder: Holder) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    except (ValueError, OverflowError, OSError):
        since = "an unknown time"
    return f"process {holder.pid} on {holder.host}, since {since}"
