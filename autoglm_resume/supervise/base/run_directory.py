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
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autoglm_resume import files, journal, locks
from autoglm_resume.errors import UsageError
from autoglm_resume.events import Event, RunStarted
from autoglm_resume.locks import CHECKPOINTS, Holder, Lock, locked_checkpoints
from autoglm_resume.protocol.assignment import LARGEST_JOB
from autoglm_resume.protocol.relocation import relocated


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
        with locks.held(self._lock) as lock:
            yield lock

    def holder(self) -> Holder | None:
        """Who has the run now, None if nobody."""
        return locks.holder(self._lock)


def last_run(checkpoints: Path) -> Path | None:
    """The directory of the run that had this directory of checkpoints last, if that is known."""
    with contextlib.suppress(OSError, ValueError), files.reading(checkpoints / CHECKPOINTS) as file:
        run = locks.read_holder(file.fileno()).run
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
