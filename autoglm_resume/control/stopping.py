"""Asking a supervisor to save and stop, and waiting until it has."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from autoglm_resume.control.asking import send, supervisor
from autoglm_resume.locks import Holder
from autoglm_resume.observe.progress import Waiting
from autoglm_resume.observe.pure.goodput import summarize
from autoglm_resume.supervise.base.run_directory import RunDirectory


@contextlib.contextmanager
def asked(run: RunDirectory, holder: Holder) -> Iterator[int | None]:
    """Send SIGTERM to the supervisor `holder`; yields its pidfd, None if it has ended already.

    Raises UsageError if it is on another host, AutoglmError if it is not ours to signal.
    """
    with supervisor(run, holder, "stop") as process:
        if process is not None:
            send(process, signal.SIGTERM)
        yield process


def wait(process: int | None) -> None:
    """Return when a supervisor has ended that was `asked` to stop."""
    if process is not None:
        with Waiting("saving and stopping") as waiting:
            waiting.until(process)


def outcome(run: RunDirectory) -> str:
    """How it ended, and what is saved."""
    summary = summarize(run.events())
    if summary.state == "finished":
        at = "" if summary.step is None else f" at step {summary.step}"
        return f"{run.path}: finished{at}"
    if summary.checkpoint_step is None:
        return f"{run.path}: stopped before its first checkpoint, nothing was saved"
    return f"{run.path}: stopped, saved at step {summary.checkpoint_step}"
