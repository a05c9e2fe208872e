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
from autoglm_resume.supervise import standing
from autoglm_resume.supervise.pump import Pump, Signals
from autoglm_resume.supervise.rundir import RunDirectory
from autoglm_resume.supervise.supervisor import STOPS

LOG = "resume.log"
"""In a run's directory: what its supervisor said."""


@dataclass(frozen=True)
class Ended:
    """What became of one run."""

    run: Path
    continued: bool
    code: int
    """Exit code of its supervisor, 0 for a run that was left alone."""
    text: str


def resume(runs: Sequence[RunDirectory], tell: Callable[[Ended], None]) -> int:
    """Continue those of `runs` that go on without a person, all at once, and wait for their end.

    `tell` is called for each run when its fate is known. A stop asked for by a signal is passed on
    to all. Returns the worst exit code (see `standing.worst`). Raises OSError.
    """
    pump = Pump()
    running: dict[Path, subprocess.Popen[bytes]] = {}
    codes: list[int] = []

    def pass_on(number: signal.Signals) -> None:
        for process in running.values():
            process.send_signal(number)

    def end(run: RunDirectory, pidfd: int) -> None:
        pump.forget(pidfd)
        os.close(pidfd)
        code = running.pop(run.path).wait()
        code = died_by_signal(-code) if code < 0 else code
        codes.append(code)
        now = standing.of(run.events()).why
        tell(Ended(run.path, True, code, f"continued, exit code {code}: {now}"))

    signals = Signals(pump, STOPS, pass_on)
    try:
        for run in runs:
            reason = _reason_against(run)
            if reason is not None:
                tell(Ended(run.path, False, 0, reason))
                continue
            running[run.path] = process = _start(run)
            pidfd = os.pidfd_open(process.pid)
            pump.watch(pidfd, lambda run=run, pidfd=pidfd: end(run, pidfd))  # type: ignore[misc]
        pump.wait(lambda: not running)
    finally:
        signals.close()
        pump.close()
    return standing.worst(codes)


def _reason_against(run: RunDirectory) -> str | None:
    """Why not to continue `run`, None to do so."""
    holder = run.holder()
    if holder is not None:
        return f"running, process {holder.pid} on {holder.host}"
    try:
        home = Path(str(run.job().get("run_dir", "")))
    except AutoglmError as error:
        return f"left alone: {error.message}"
    if home.resolve() != run.path.resolve():
        return f"set aside or moved from {home}"
    found = standing.of(run.events())
    return None if found.goes_on else found.why


def _start(run: RunDirectory) -> subprocess.Popen[bytes]:
    with (run.path / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "autoglm_resume.cli", "resume", str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches it once, through us: twice would mean to stop without saving.
            start_new_session=True,
        )
