"""The ranks of this machine: their processes, board, logs and savers."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoglm_resume import events, files
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.events import Event
from autoglm_resume.locks import Lock
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Beat, Board, Control
from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.base.assign import assignment
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.core.evidence import Evidence
from autoglm_resume.supervise.core.history import History, Silences, added, skipped
from autoglm_resume.supervise.core.liveness import Limits, Look
from autoglm_resume.supervise.evidence import stacks
from autoglm_resume.supervise.evidence.collect import Witness, agent_said, gather
from autoglm_resume.supervise.node import Launched, Listener, Order
from autoglm_resume.supervise.persistence import Persistence
from autoglm_resume.supervise.ranks.group import (
    AGENT,
    Exit,
    WorkerGroup,
    children,
    end_orphans,
    reap,
)
from autoglm_resume.supervise.ranks.hang_detector import HangDetector
from autoglm_resume.supervise.ranks.launcher import KnownImports, StartUp
from autoglm_resume.supervise.ranks.launchers import LAUNCHERS
from autoglm_resume.supervise.ranks.log_follower import LogFollower
from autoglm_resume.supervise.ranks.observed import WELL, Observed
from autoglm_resume.supervise.ranks.script_ends import ScriptEnds

LOOK = 0.25
"""Seconds between looks for ranks that do not end; exits are noticed at once, without it."""
REAP = 5.0
"""Seconds between looks for orphans that have ended; until then they are zombies."""


class LocalNode:
    """A `node.Node`, for one life of a supervisor."""

    def __init__(
        self,
        context: RunContext,
        lock: Lock,
        run_id: str,
        past: History,
        persistence: Persistence,
        helpers: Callable[[], frozenset[int]],
    ) -> None:
        """`helpers` are children of this process that are no ranks."""
        self.name = socket.gethostname()
        self._context = context
        self._lock = lock
        self._run_id = run_id
        self._persistence = persistence
        self._helpers = helpers
        self._launcher = LAUNCHERS[context.job.launcher](
            context, KnownImports(past.imports, past.imports_end), helpers
        )
        self._past = past
        self._silences = past.silences
        self.left: frozenset[int] = frozenset()
        self._now: _Ranks | None = None

    def start(self, order: Order, listener: Listener) -> Launched:
        context = self._context
        if self.left:  # by an attempt that is not complete all the same
            self._end_orphans()
            self.left = frozenset()
        context.run.attempt(order.number).mkdir(parents=True, exist_ok=True)
        fixed = context.job.env.get("MASTER_PORT")
        endpoint = self._launcher.rendezvous(int(fixed) if fixed else None)
        board, fd = Board.create(order.world_size)
        task = assignment(
            context.job,
            context.run,
            self._run_id,
            order.number,
            endpoint,
            resume := order.resume,
            f"/proc/{os.getpid()}/fd/{fd}",
            self._persistence.names,
            order.branches,
            skipped(self._past, context.job.checkpoint.skip, resume.id if resume else None),
            self._past.begins,
        )
        self._now = ranks = _Ranks(context, task, board, fd, self._silences, listener)
        self._lock.describe(task.board)
        files.write(task.path, task.to_json(), durable=False, private=True)
        self._launcher.start(task, ranks.group)
        if ranks.group.pids:
            ranks.watch()
            context.loop.every(REAP, self._reap)
        return Launched(task.master_port, dict(ranks.group.pids))

    def learn(self, seen: StartUp) -> None:
        self._launcher.learn(seen)

    def unlearn(self, module: str) -> None:
        self._launcher.unlearn(module)

    @property
    def _ranks(self) -> _Ranks:
        assert self._now is not None  # between `start` and `ended`
        return self._now

    @property
    def alive(self) -> Sequence[int]:
        return self._ranks.group.alive

    def signal(self, rank: int, number: int) -> None:
        self._ranks.group.signal(rank, number)

    def beats(self) -> tuple[Beat, ...]:
        return self._ranks.board.beats()

    def announce(self, control: Control) -> None:
        self._ranks.board.ask(control)

    def looks(self, now: float) -> dict[int, Look]:
        group = self._ranks.group
        return self._ranks.detector.looks(now, {rank: group.pids[rank] for rank in group.alive})

    def condemn(self, ranks: Sequence[int], now: float) -> dict[int, str]:
        self._ranks.detector.condemn(ranks, now)
        return {rank: machine.state(self._ranks.group.pids[rank]) for rank in ranks}

    def spent(self) -> list[dict[int, float]]:
        return self._ranks.detector.spent()

    def stacks(self) -> dict[int, tuple[str, ...]]:
        ranks = self._ranks
        alive = [rank for rank in ranks.group.alive if rank != AGENT]
        return stacks.collect(self._context.loop, ranks.group, alive, ranks.task.stacks)

    def broken(self) -> None:
        # What the victims print must not come before the first failing rank's traceback.
        self._ranks.follower.quiet = True

    def stop(self, grace: float, *, at_once: bool) -> None:
        ranks = self._ranks
        group, ends = ranks.group, ranks.ends
        linger = frozenset([AGENT, *(() if at_once else ends.codes)])
        try:
            group.stop(grace, linger, lambda: ends.overdue(time.monotonic(), group.alive))
            self._launcher.ended()
            if self.well:
                self.left = children() - self._launcher.own() - self._helpers()
            else:
                self._end_orphans()
        finally:
            ranks.follower.drain()

    def evidence(self, seen: Observed) -> Evidence:
        ranks = self._ranks
        beats = seen.beats or ranks.board.beats()
        group = ranks.group
        return Evidence(
            tuple(gather(ranks.task, group.pids, group.exits, beats, seen, ranks.ends)),
            agent_said(ranks.task, group.exits),
            ranks.witness.machine() if ranks.witness is not None else None,
        )

    @property
    def well(self) -> bool:
        return self._ranks.well

    def ended(self) -> Silences:
        silences: Silences = {}
        if self._now is not None:
            self._context.loop.cancel(self._reap)
            silences = self._now.close()
            self._silences = added(self._silences, silences)
            self._now = None
        return silences

    def settle(self, from_memory: Callable[[str], bool]) -> Sealed | None:
        return self._persistence.settle(from_memory)

    def close(self) -> None:
        self._launcher.close()

    def _end_orphans(self) -> None:
        end_orphans(self._launcher.own() | self._helpers())

    def _reap(self) -> None:
        ranks = self._ranks
        known = self._launcher.own() | self._helpers() | frozenset(ranks.group.pids.values())
        unknown = children() - known
        # One that is unknown only now may be introduced in a moment.
        reap(unknown & ranks.unknown)
        ranks.unknown = unknown


class _Ranks:
    """What there is of one attempt."""

    def __init__(
        self,
        context: RunContext,
        task: Assignment,
        board: Board,
        fd: int,
        past: Silences,
        listener: Listener,
    ) -> None:
        self._context = context
        self._listener = listener
        self._board_fd = fd
        self.task = task
        self.board = board
        heartbeat = context.job.heartbeat
        self.detector = HangDetector(board, Limits(heartbeat.timeout, heartbeat.startup), past)
        self.group = WorkerGroup(context.loop, self._exited)
        self.ends = ScriptEnds(heartbeat.timeout)
        self.witness: Witness | None = None
        self.unknown: frozenset[int] = frozenset()
        """Children that were neither ranks nor helpers at the last look."""
        screen = context.screen
        self.follower = LogFollower(
            context.loop, task.path.parent, screen.worker_line, self._heard, screen.bar
        )

    def watch(self) -> None:
        """The ranks run."""
        written = [Path(self.task.directory), Path(self.task.checkpoint.dir)]
        self.witness = Witness(self.group.pids.values(), written)
        self._context.loop.every(LOOK, self._end_stuck)

    @property
    def well(self) -> bool:
        exits = self.group.exits
        codes = [how.code for rank, how in exits.items() if rank != AGENT]
        return (
            (len(codes) == self.task.world_size or AGENT in exits)
            and all(
                (how.code in (0, None) and not how.by_us)
                or (rank == AGENT and self._ended_well_but_stuck)
                for rank, how in exits.items()
            )
            and all(code == 0 for code in self.ends.codes.values())
        )

    def close(self) -> Silences:
        """Forget it; returns the silences of its ranks."""
        self.group.stop(0.0)
        self._context.loop.cancel(self._end_stuck)
        if self.witness is not None:
            self.witness.close()
        self.follower.quiet = False
        self.follower.close()
        stacks.tidy(map(self.task.stacks, range(self.task.world_size)))
        silences = self.detector.silences()
        self.board.close()
        os.close(self._board_fd)
        return silences

    def _heard(self, rank: int, event: Event) -> None:
        match event:
            case events.RankStarted(pid=pid) if AGENT in self.group.pids:
                self.group.add(rank, pid)
            case events.RankEnded(code=code, mono=float(at)):
                self.ends.add(rank, code, at)
            case events.RankFinished(mono=float(at)):
                self.ends.finished[rank] = at
        self._listener.heard(rank, event)

    def _exited(self, rank: int, how: Exit) -> None:
        if how.by_us:
            return
        code, number = how.code, how.signal
        if rank in self.ends.stuck:
            code, number = self.ends.codes[rank], None
        elif rank != AGENT and code is None and number is None:  # a child of torchrun
            self.follower.drain()
            code = self.ends.codes.get(rank, 1)
        if rank == AGENT and self._ended_well_but_stuck:
            return  # it complains of a rank that we killed
        if number is not None or code not in WELL:
            self._listener.exited(rank, how)

    @property
    def _ended_well_but_stuck(self) -> bool:
        """Whether every script came to its good end, though not every process."""
        return bool(self.ends.stuck) and self.ends.all_well(self.task.world_size)

    def _end_stuck(self) -> None:
        now, alive = time.monotonic(), self.group.alive
        for rank in self.ends.newly_stuck(now, alive, self.group.pids):
            patience = self._context.job.heartbeat.timeout
            text = f"rank {rank} did not end within {patience:.1f} s of its script; killed"
            self._context.tell(events.WarningGiven(text=text))
            self.group.signal(rank, signal.SIGKILL)
