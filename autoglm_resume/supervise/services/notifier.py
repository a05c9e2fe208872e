"""The supervisor's handle on the process that tells people: it is told, and never waited for."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import RUN
from autoglm_resume.supervise.base import spawn
from autoglm_resume.supervise.base.event_loop import EventLoop

FLUSH_SECONDS = 5.0
"""What the end of a run waits for messages that are still under way."""
MESSAGE = 4096
STARTS = 5
"""Times the process is started before nobody is told any more."""

_TOLD = (
    *(events.SupervisorStarted, events.AttemptStarted, events.FirstStep, events.Committed),
    *(events.GroupFailed, events.DecisionMade, events.Straggler),
    *(events.RunCompleted, events.RunInterrupted, events.RunFailed),
)
_FIELDS = frozenset(
    {
        *("event", "time", "attempt", "id", "step", "rank", "root_rank", "kind", "summary"),
        *("place", "action", "delay", "reason", "code", "ratio", "seconds", "resumed"),
    }
)


class Notifier:
    """Passes on what happens, one datagram per event, to the messenger.

    Nothing here raises or waits, but for `close`. `tell` hears of a target that fails, its address
    masked, once until it works again.
    """

    def __init__(
        self,
        loop: EventLoop,
        job: Job,
        environment: Mapping[str, str],
        run: Path,
        tell: events.Tell,
    ) -> None:
        self._loop = loop
        self._targets = [notice.model_dump(mode="json") for notice in job.notify]
        self._about: dict[str, Any] = {"run": str(run), "name": job.name}
        self._cwd = job.workdir
        # It outlives a supervisor that dies, by some seconds, and must not be taken for a leftover.
        self._environment = {name: at for name, at in environment.items() if name != RUN}
        self._log = run / "notify.log"
        self._tell = tell
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    @property
    def pids(self) -> frozenset[int]:
        """Of the process, if there is one: it is not an orphan that a rank left behind."""
        return frozenset([self._process.pid] if self._process else [])

    def start(self, run_id: str) -> None:
        """Begin; without `notify` in the job, nothing happens here or later."""
        self._about |= {"run_id": run_id, "host": socket.gethostname()}
        if self._targets:
            self._warn()
            self._start()

    def _warn(self) -> None:
        """Say now which address is missing, not when there is something to tell."""
        for target in self._targets:
            name = str(target["webhook"] or "").strip("${}")
            if (target["webhook"] or "").startswith("$") and not self._environment.get(name):
                text = f"notify: {target['webhook']} is not set, so nobody will be told through it"
                self._tell(events.WarningGiven(text=text))

    def event(self, event: Event) -> None:
        """Pass it on, if it is one that people may want to be told of."""
        if not self._starts or not isinstance(event, _TOLD):
            return
        if isinstance(event, events.FirstStep) and event.rank != 0:
            return
        record = events.to_record(event)
        if self._socket is None:
            self._start()
        self._send({"event": _short(record, 600)}, {"event": _short(record, 60)})

    def close(self, hurried: Callable[[], bool]) -> None:
        """Wait a little for messages that are under way, and end the process."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + FLUSH_SECONDS
        if not self._loop.wait(lambda: self._socket is None or hurried(), until):
            # At its low priority it may not even have come to say so itself.
            reason = "it took longer than the end of the run could wait"
            self._tell(events.NotifyFailed(target="its own process", reason=reason))
        self._starts = 0
        self._end()

    def _start(self) -> None:
        if self._starts >= STARTS:
            return
        self._starts += 1
        try:
            self._process, ours = spawn.start(
                "autoglm_resume.messenger.process", [str(self._cwd)], self._environment, self._log
            )
        except OSError as error:
            reason = f"it could not be started: {error.strerror}"
            self._tell(events.NotifyFailed(target="its own process", reason=reason))
            return
        ours.setblocking(False)
        self._socket = ours
        self._loop.watch(ours, self._readable)
        for target in self._targets:
            self._send({"target": target})
        self._send({"about": self._about})

    def _send(self, *forms: dict[str, Any]) -> None:
        """The first of `forms` that is short enough. A process that does not read loses it."""
        for form in forms:
            data = json.dumps(form, ensure_ascii=False, default=str).encode("utf-8", "replace")
            if self._socket is not None and (len(data) <= MESSAGE or "event" not in form):
                with contextlib.suppress(OSError):
                    self._socket.send(data)
                return

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        with contextlib.suppress(ValueError):  # one that was too long for `MESSAGE` is cut
            said = json.loads(data)
            self._tell(events.NotifyFailed(target=said["target"], reason=said["reason"]))

    def _end(self) -> None:
        if self._socket is not None:
            self._loop.forget(self._socket)
            self._socket.close()
            self._socket = None
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _short(record: dict[str, Any], longest: int) -> dict[str, Any]:
    """What messages need of an event; texts no longer than `longest`."""
    return {
        key: value[:longest] if isinstance(value, str) else value
        for key, value in record.items()
        if key in _FIELDS and isinstance(value, str | int | float | None)
    }
