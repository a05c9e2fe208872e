"""Asking a supervisor to save and stop, and waiting until it has."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.observe.goodput import summarize
from autoglm_resume.observe.say import seconds
from autoglm_resume.observe.tables import terminal
from autoglm_resume.supervise.rundir import Holder, RunDirectory

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


def stop(run: RunDirectory, holder: Holder) -> None:
    """Send SIGTERM to the supervisor `holder`, and return when it has ended.

    Raises UsageError if it is on another host, AutoglmError if it is not ours to signal.
    """
    if holder.host != socket.gethostname():
        raise UsageError(
            f"{run.path}: its supervisor is process {holder.pid} on {holder.host}, "
            f"this is {socket.gethostname()}",
            hint=f"run it there: autoglm stop {run.path}",
        )
    try:
        process = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return
    try:
        if not _has_open(holder.pid, run.path / "lock"):
            if run.holder() is None:
                return
            # The lock's text is of an earlier supervisor, whose number may be anybody's by now.
            raise AutoglmError(
                f"{run.path}: its supervisor is just starting", hint="try again in a second"
            )
        signal.pidfd_send_signal(process, signal.SIGTERM)
        _wait(process)
    except ProcessLookupError:
        return
    except PermissionError:
        raise AutoglmError(
            f"{run.path}: its supervisor, process {holder.pid}, belongs to another user"
        ) from None
    finally:
        os.close(process)


def outcome(run: RunDirectory) -> str:
    """How it ended, and what is saved."""
    summary = summarize(run.events())
    if summary.state == "finished":
        return f"{run.path}: finished at step {summary.step}"
    if summary.checkpoint_step is None:
        return f"{run.path}: stopped before its first checkpoint, nothing was saved"
    return f"{run.path}: stopped, saved at step {summary.checkpoint_step}"


def _has_open(pid: int, lock: Path) -> bool:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if fd.samefile(lock):
                return True
        except FileNotFoundError:
            continue
    return False


def _wait(process: int) -> None:
    began = time.monotonic()
    live = terminal(sys.stderr)
    if not live:
        print("autoglm: saving and stopping", file=sys.stderr)
    for picture in itertools.cycle(_SPINNER):
        if select.select([process], [], [], 0.1 if live else None)[0]:
            break
        waited = seconds(time.monotonic() - began)
        print(f"\r\x1b[2K{picture} saving and stopping, {waited}", end="", file=sys.stderr)
        sys.stderr.flush()
    if live:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
