"""Continuing every run of a directory, each by a supervisor of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoglm_resume.errors import AutoglmError, died_by_signal
from autoglm_resume.events import Committed
from autoglm_resume.supervise.base import home
from autoglm_resume.supervise.base.event_loop import EventLoop, Signals
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.stops import ASKS
from autoglm_resume.supervise.core import resumable

LOG = "resume.log"
"""In a run's directory: what its supervisor said."""


@dataclass(frozen=True)
class Fate:
    """What became of one run."""

    run: Path
    continued: bool
    code: int
    """Exit code of its supervisor, 0 for a run that was left alone."""
    text: str


def resume(runs: Sequence[RunDirectory], tell: Callable[[Fate], None]) -> int:
    """Continue those of `runs` that go on without a person, all at once, and wait for their end.

    A supervisor that is killed is followed by another, if it came further than the one before.
    `tell` is called for each run when its fate is known. A stop asked for by a signal is passed on
    to all. Returns the worst exit code (see `standing.worst`).
    """
    return _Together(tell).resume(runs)


class _Together:
    def __init__(self, tell: Callable[[Fate], None]) -> None:
        self._tell = tell
        self._loop = EventLoop()
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        self._codes: list[int] = []
        self._stopping = False

    def resume(self, runs: Sequence[RunDirectory]) -> int:
        signals = Signals(self._loop, ASKS, self._pass_on)
        try:
            for run in runs:
                self._look_at(run)
            self._loop.wait(lambda: not self._running)
        finally:
            signals.close()
            self._loop.close()
        return resumable.worst(self._codes)

    def _look_at(self, run: RunDirectory) -> None:
        try:
            reason = _reason_against(run)
            if reason is None:
                self._start(run)
                return
        except OSError as error:  # the others can be continued all the same
            reason = f"left alone: {error.filename or run.path}: {error.strerror}"
            self._codes.append(AutoglmError.exit_code)
        self._tell(Fate(run.path, False, 0, reason))

    def _pass_on(self, number: signal.Signals) -> None:
        self._stopping = True
        for process in self._running.values():
            process.send_signal(number)

    def _start(self, run: RunDirectory) -> None:
        with (run.path / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "autoglm_resume.cli", "resume", str(run.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches it once, through us: twice would mean to stop without saving.
                start_new_session=True,
            )
        self._running[run.path] = process
        pidfd, before = os.pidfd_open(process.pid), _commits(run)

        def ended() -> None:
            self._loop.forget(pidfd)
            os.close(pidfd)
            code = self._running.pop(run.path).wait()
            if code < 0 and not self._stopping and _commits(run) > before:
                self._start(run)
            else:
                self._end(run, died_by_signal(-code) if code < 0 else code)

        self._loop.watch(pidfd, ended)

    def _end(self, run: RunDirectory, code: int) -> None:
        self._codes.append(code)
        why = resumable.of(run.events()).why
        self._tell(Fate(run.path, True, code, f"continued, exit code {code}: {why}"))


def _commits(run: RunDirectory) -> int:
    return sum(isinstance(event, Committed) for event in run.events())


def _reason_against(run: RunDirectory) -> str | None:
    """Why not to continue `run`, None to do so."""
    holder = run.holder()
    if holder is not None:
        return f"running, process {holder.pid} on {holder.host}"
    try:
        if (before := home.left(run)) is not None:  # by a person, who may want it to rest
            return f"set aside or moved from {before}"
    except AutoglmError as error:
        return f"left alone: {error.message}"
    found = resumable.of(run.events())
    return None if found.goes_on else found.why
