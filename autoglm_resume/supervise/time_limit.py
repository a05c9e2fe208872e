"""Stopping in time: a job of a scheduler ends, saved or not, when its time is over."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from autoglm_resume import events
from autoglm_resume.cluster import commands, slurm
from autoglm_resume.supervise.base.event_loop import EventLoop

DAY = 86400.0
"""The longest wait in one: no selector takes a month."""
PATIENCE = 10.0
"""Seconds to wait, at the end, for word that there is more time than was known."""


class TimeLimit:
    """Calls `reached` so long before the end of the Slurm job that its run can stop.

    Asks Slurm once for the end, and once more when it has come: it may have been put off.
    """

    def __init__(
        self,
        loop: EventLoop,
        job: slurm.Allocation | None,
        lead: float,
        reached: Callable[[], None],
        tell: events.Tell,
    ) -> None:
        self._loop = loop
        self._job = job
        self._lead = lead
        self._reached = reached
        self._tell = tell
        self._asking: subprocess.Popen[str] | None = None
        self._ends: float | None = None
        """Monotonic seconds."""
        if job is None:
            return
        tell(events.Slurm(job=job.id, restarts=job.restarts, node=job.node))
        if job.ends is None:
            self._ask()
        else:
            self._learn(job.ends - time.time())

    @property
    def pids(self) -> frozenset[int]:
        """Of the process that asks."""
        return frozenset([self._asking.pid] if self._asking is not None else [])

    def near(self) -> bool:
        """Whether a stop now is because of the end, whoever asked for it."""
        ahead = self._lead + slurm.EARLY
        return self._ends is not None and time.monotonic() >= self._ends - ahead

    def close(self) -> None:
        """Forget it."""
        self._loop.cancel(self._due)
        self._loop.cancel(self._out_of_time)
        if self._asking is not None:
            self._asking.kill()
            self._heard()

    def _ask(self) -> bool:
        assert self._job is not None
        self._asking = commands.ask_end(self._job.id)
        if self._asking is None or self._asking.stdout is None:
            return False
        self._loop.watch(self._asking.stdout, self._answered)
        return True

    def _answered(self) -> None:
        ends = self._heard().strip()
        if ends.isdecimal():
            self._learn(int(ends) - time.time())
        elif self._ends is not None:
            self._out_of_time()

    def _heard(self) -> str:
        assert self._asking is not None
        assert self._asking.stdout is not None
        self._loop.forget(self._asking.stdout)
        text, _ = self._asking.communicate()
        self._asking = None
        return text

    def _learn(self, left: float) -> None:
        first = self._ends is None
        self._ends = time.monotonic() + left
        if first:
            # A limit that was chosen too short still leaves half of it for training.
            self._lead = min(self._lead, left / 2)
            self._tell(events.TimeLimitKnown(seconds=left, lead=self._lead))
        self._loop.cancel(self._out_of_time)
        self._wait()

    def _wait(self) -> None:
        assert self._ends is not None
        self._loop.cancel(self._due)
        left = self._ends - self._lead - time.monotonic()
        if left > 0:
            self._loop.every(min(left, DAY), self._due)
        else:
            self._out_of_time()

    def _due(self) -> None:
        assert self._ends is not None
        if time.monotonic() < self._ends - self._lead:
            self._wait()
            return
        self._loop.cancel(self._due)
        if self._ask():
            self._loop.every(PATIENCE, self._out_of_time)
        else:
            self._out_of_time()

    def _out_of_time(self) -> None:
        self._loop.cancel(self._out_of_time)
        self._reached()
