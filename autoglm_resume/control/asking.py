"""Asking a supervisor for something by a signal, and waiting for what comes of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.observe.pure.say import seconds
from autoglm_resume.observe.tables import terminal
from autoglm_resume.supervise.base.run_directory import Holder, RunDirectory

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


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
            hint=f"run it there: autoglm {command} {run.path}",
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


class Waiting:
    """Says on standard error what one waits for: a moving picture on a terminal, else one line."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._began = time.monotonic()
        self._live = terminal(sys.stderr)
        self._pictures = itertools.cycle(_SPINNER)

    def __enter__(self) -> Waiting:
        if not self._live:
            print(f"autoglm: {self.what}", file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def until(self, *sources: int | DirectoryWatch) -> None:
        """Return when one of `sources` is readable."""
        while not select.select(sources, [], [], 0.1 if self._live else None)[0]:
            waited = seconds(time.monotonic() - self._began)
            line = f"{next(self._pictures)} {self.what}, {waited}"
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
