"""Warm spares: processes that have come as far as a rank can come before it knows which it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm_resume import events
from autoglm_resume.supervise.base.event_loop import EventLoop

MESSAGE = 1 << 20
FAILURES = 2
"""After so many that could not be made ready, no more are raised: the script does not agree."""


@dataclass
class _Spare:
    pid: int
    pidfd: int
    """It may be reaped before we hear that it is dead."""
    link: socket.socket
    files: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of change of the project's files in it."""
    ready: bool = False


class Spares:
    """The spares of one run; `wanted` at a time. `raise_one` has the zygote fork one more."""

    def __init__(
        self,
        loop: EventLoop,
        wanted: int,
        raise_one: Callable[[], None],
        tell: events.Tell,
    ) -> None:
        self._loop = loop
        self._wanted = wanted
        self._raise_one = raise_one
        self._tell = tell
        self._spares: list[_Spare] = []
        self._expected = 0
        self._failures = 0

    @property
    def pids(self) -> frozenset[int]:
        """Of those that nobody has taken."""
        return frozenset(spare.pid for spare in self._spares)

    def fill(self) -> None:
        """Raise what is missing; the ranks train, and nothing waits for it."""
        if self._failures >= FAILURES:
            return
        for _ in range(self._wanted - len(self._spares) - self._expected):
            self._expected += 1
            self._raise_one()

    def add(self, pid: int, link: socket.socket) -> None:
        """The zygote forked one; `link` leads to it."""
        self._expected -= 1
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            link.close()
            return
        spare = _Spare(pid, pidfd, link)
        self._spares.append(spare)
        self._loop.watch(link, lambda: self._readable(spare))

    def forget_expected(self) -> None:
        """The zygote is gone, and will answer no more."""
        self._expected = 0

    def take(self, assignment: Path, ranks: Iterable[int]) -> dict[int, int]:
        """Make spares that are ready into `ranks`, as far as there are some; pids by rank."""
        taken: dict[int, int] = {}
        for rank in ranks:
            spare = self._next()
            if spare is None:
                break
            order = json.dumps({"assignment": str(assignment), "rank": rank}).encode()
            try:
                spare.link.send(order)
            except OSError:
                self._end(spare)
                continue
            taken[rank] = spare.pid
            self._forget(spare)
        return taken

    def close(self) -> None:
        """End them all."""
        for spare in list(self._spares):
            self._end(spare)

    def _next(self) -> _Spare | None:
        for spare in list(self._spares):
            if not spare.ready:
                continue
            changed = _changed(spare.files)
            if changed is None:
                return spare
            self._tell(events.SpareDropped(pid=spare.pid, reason=f"{changed} has changed"))
            self._end(spare)
        return None

    def _readable(self, spare: _Spare) -> None:
        try:
            message = spare.link.recv(MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        died = {"op": "failed", "reason": "it died"}
        said: dict[str, Any] = json.loads(message) if message else died
        if said["op"] == "ready":
            spare.ready, spare.files = True, said["files"]
            self._tell(events.SpareReady(pid=spare.pid))
            return
        self._failures += 1
        self._end(spare)
        self._tell(events.SpareFailed(pid=spare.pid, reason=said["reason"]))

    def _end(self, spare: _Spare) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(spare.pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, spare.pidfd, os.WEXITED)
        self._forget(spare)

    def _forget(self, spare: _Spare) -> None:
        self._spares.remove(spare)
        self._loop.forget(spare.link)
        spare.link.close()
        os.close(spare.pidfd)


def _changed(files: Mapping[str, list[int]]) -> str | None:
    """A file of the project that is not any more what the spare has read; None if there is none."""
    for name, then in files.items():
        try:
            status = Path(name).stat()
        except OSError:
            return name
        if [status.st_size, status.st_mtime_ns] != then:
            return name
    return None
