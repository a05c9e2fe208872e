"""Asking a supervisor for something by a signal, and waiting for what comes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from autoglm_resume import output
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.locks import Holder
from autoglm_resume.supervise.base.run_directory import RunDirectory


@contextlib.contextmanager
def supervisor(run: RunDirectory, holder: Holder, command: str) -> Iterator[int | None]:
    """A pidfd of the supervisor `holder`, certainly of it; None if it has ended already.

    Raises UsageError if it is on another host, where `command` should be run, and AutoglmError if
    it is not ours to signal.
    """
    if holder.host != socket.gethostname():
        raise UsageError(
            f"{run.path}: its supervisor is process {holder.pid} on {holder.host}, "
            f"this is {socket.gethostname()}",
            hint=f"run it there: {output.command(command, run.path)}",
        )
    try:
        process = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        there = _has_open(holder.pid, run.path / "lock")
        if not there and run.holder() is not None:
            # The lock's text is of an earlier supervisor, whose number may be anybody's by now.
            raise just_starting(run)
        yield process if there else None
    except PermissionError:
        raise AutoglmError(
            f"{run.path}: its supervisor, process {holder.pid}, belongs to another user"
        ) from None
    finally:
        os.close(process)


def just_starting(run: RunDirectory) -> AutoglmError:
    """What to say of a supervisor that cannot be asked yet."""
    return AutoglmError(
        f"{run.path}: its supervisor is just starting", hint="try again in a second"
    )


def send(process: int, number: int) -> None:
    """Signal a pidfd; one that has ended needs no asking."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)


def _has_open(pid: int, lock: Path) -> bool:
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False
    for fd in descriptors:
        try:
            if fd.samefile(lock):
                return True
        except FileNotFoundError:
            continue
    return False
