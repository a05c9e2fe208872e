"""A worker group as processes: who is alive, how each ended, and ending the rest."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from autoglm_resume.errors import Unkillable
from autoglm_resume.protocol.assignment import SUPERVISOR
from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.base.event_loop import EventLoop

AGENT = -1
"""Key of the torchrun process itself in a group."""
STUCK = 5.0
"""Seconds to wait for the end of a killed orphan."""
REPORT = 30.0
"""Seconds for torchrun to say how its ranks ended: it does so within one, but on busy processors 5
were not enough, and the rank that failed first was not told from those that torchrun ended."""
UNKILLABLE = 60.0
"""Seconds after SIGKILL when a rank must be stuck in the kernel."""


@dataclass(frozen=True)
class Exit:
    """How a process ended; both None where another process reaped it."""

    code: int | None
    signal: int | None
    mono: float
    order: int
    by_us: bool


class WorkerGroup:
    """Processes keyed by rank; pidfds tell when one ends, and no pid is ever signalled after that.

    A process that we do not own (a rank below torchrun) is watched all the same; only its exit
    code is then unknown here.
    """

    def __init__(self, loop: EventLoop, on_exit: Callable[[int, Exit], None]) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self._pidfds: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self.exits: dict[int, Exit] = {}
        self.stopping = False
        self._not_ours: set[int] = set()
        """Ranks that were on their way out when the others were asked to end."""

    def add(self, rank: int, pid: int) -> None:
        """Watch `pid` as `rank`."""
        self.pids[rank] = pid
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(rank, None, None)
            return
        self._pidfds[rank] = fd
        self._loop.watch(fd, lambda: self._readable(rank))

    @property
    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return sorted(self._pidfds)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it still lives."""
        fd = self._pidfds.get(rank)
        if fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)

    def stop(
        self,
        grace: float,
        linger: frozenset[int] = frozenset(),
        overdue: Callable[[], bool] = lambda: False,
    ) -> None:
        """End every rank: SIGTERM, and SIGKILL after `grace` seconds.

        The processes in `linger` are given time to end by themselves after the others, until they
        are `overdue`: torchrun reports exit codes that only it can know.
        """
        # A killed process closes its connections a while before it is gone: on a busy machine a
        # peer failed by that and was seen first, and the SIGKILL from outside counted as ours.
        self._not_ours |= {rank for rank in self.alive if machine.is_dying(self.pids[rank])}
        self.stopping = True
        if grace > 0:
            for rank in self._but(linger):
                self.signal(rank, signal.SIGTERM)
                # A stopped process would see the SIGTERM only after it is continued.
                self.signal(rank, signal.SIGCONT)
            self._loop.wait(lambda: not self._but(linger), time.monotonic() + grace)
        for rank in self._but(linger):
            self.signal(rank, signal.SIGKILL)
        self._await_end(lambda: not self._but(linger))
        self._loop.wait(
            lambda: not self._pidfds or (AGENT not in self._pidfds and overdue()),
            time.monotonic() + max(grace, REPORT),
        )
        for rank in self.alive:
            self.signal(rank, signal.SIGKILL)
        self._await_end(lambda: not self._pidfds)

    def _await_end(self, ended: Callable[[], bool]) -> None:
        if self._loop.wait(ended, time.monotonic() + UNKILLABLE):
            return
        left = ", ".join(
            f"rank {rank} (process {self.pids[rank]}, {machine.state(self.pids[rank])})"
            for rank in self.alive
        )
        self._abandon()
        raise Unkillable(
            f"{left}: killed {UNKILLABLE:.0f} s ago and still there",
            hint="it is stuck in the kernel: look at the disk, network mount or GPU it uses, or "
            "continue the run on another machine",
        )

    def _abandon(self) -> None:
        """Ask for nobody's end a second time: the kernel has to let go of them first."""
        for fd in self._pidfds.values():
            self._loop.forget(fd)
            os.close(fd)
        self._pidfds.clear()

    def _but(self, spared: frozenset[int]) -> list[int]:
        return [rank for rank in self.alive if rank not in spared]

    def _readable(self, rank: int) -> None:
        fd = self._pidfds[rank]
        try:
            result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            self._ended(rank, None, None)
            return
        if result is None:
            return
        if result.si_code == os.CLD_EXITED:
            self._ended(rank, result.si_status, None)
        else:
            self._ended(rank, None, result.si_status)

    def _ended(self, rank: int, code: int | None, number: int | None) -> None:
        fd = self._pidfds.pop(rank, None)
        if fd is not None:
            self._loop.forget(fd)
            os.close(fd)
        by_us = self.stopping and rank not in self._not_ours
        self.exits[rank] = Exit(code, number, time.monotonic(), len(self.exits), by_us)
        self._on_exit(rank, self.exits[rank])


def end_orphans(keep: frozenset[int]) -> list[int]:
    """Kill and reap every child of this process but `keep`; returns their pids.

    This process adopts orphans, so when a worker group is dead its children are exactly what the
    ranks left behind: data loader workers, daemons, helpers. Killing one may orphan the next.
    As the first process of a container it also adopts those of others; they are left alone.
    """
    ended: list[int] = []
    while orphans := {pid for pid in children() - keep - set(ended) if _ours(pid)}:
        for pid in orphans:
            # A child's pid is ours until we reap it, so this cannot hit anybody else.
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + STUCK
        for pid in orphans:
            fd = os.pidfd_open(pid)
            # One that is stuck in the kernel cannot be ended from here: go on without it.
            if select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.waitpid(pid, 0)
            os.close(fd)
        ended += orphans
    reap(children() - keep)
    return ended


def reap(pids: frozenset[int]) -> None:
    """Forget those of these children that have ended."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _ours(pid: int) -> bool:
    """Whether a child is of this run: started by it, or left behind by what was."""
    if os.getpid() != 1:
        return True
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{SUPERVISOR}=1".encode() in environment.split(b"\0")


def children() -> frozenset[int]:
    """Of this process, zombies too."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    if lists:
        return frozenset(int(pid) for text in lists for pid in text.split())
    # A kernel without CONFIG_PROC_CHILDREN: read the parent of every process, 10 ms and more.
    return frozenset(child.pid for child in psutil.Process().children())
