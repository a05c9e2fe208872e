"""One attempt: launch the worker group, watch it, and say how it ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoglm_resume import files
from autoglm_resume.errors import Unkillable
from autoglm_resume.failures import Kind
from autoglm_resume.job.spec import Job
from autoglm_resume.journal import Event
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Beat, Board, Control, Phase
from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.core import liveness
from autoglm_resume.supervise.core.diagnosis import Failure, Previous, conclude
from autoglm_resume.supervise.core.history import Silences
from autoglm_resume.supervise.evidence import stacks
from autoglm_resume.supervise.evidence.collect import Witness, agent_said, described, gather
from autoglm_resume.supervise.ranks.fault_injector import FaultInjector
from autoglm_resume.supervise.ranks.group import Exit, Group, children, end_orphans, reap
from autoglm_resume.supervise.ranks.hang_detector import CPU_NOISE, HangDetector
from autoglm_resume.supervise.ranks.launcher import AGENT, Launcher
from autoglm_resume.supervise.ranks.log_follower import LogFollower
from autoglm_resume.supervise.ranks.observed import WELL, Observed

if TYPE_CHECKING:  # a presenter is handed in; this layer does not depend on it
    from autoglm_resume.observe.live import Screen

TICK = 0.25
"""Seconds between looks at the board; exits and events are noticed at once, without it."""

REAP = 5.0
"""Seconds between looks for orphans that have ended; until then they are zombies."""

Hear = Callable[[Event], "Event | None"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: completed, failed, or (neither) interrupted."""

    completed: bool
    failure: Failure | None
    step: int
    """Steps completed by the furthest rank, -1 if none ran."""
    checkpointed: int
    """Step of the newest checkpoint it committed, 0 without one."""
    lived: float | None = None
    """Seconds it ran, where no rank had a session."""


def hurried(stops: Sequence[signal.Signals]) -> bool:
    """Whether a person insists: a second Ctrl-C. Schedulers send SIGTERM over and over."""
    return stops.count(signal.SIGINT) > 1


class Attempt:
    """One attempt. `stops` grows by a signal each time the supervisor is asked to stop."""

    def __init__(
        self,
        loop: EventLoop,
        job: Job,
        world_size: int,
        tell: Callable[..., object],
        screen: Screen,
        rehearsal: FaultInjector,
        stops: Sequence[signal.Signals],
        helpers: Callable[[], frozenset[int]],
        between_saves: Callable[[], float | None],
        past: Silences,
        previous: Failure | Previous | None,
        broken: Callable[[], None],
    ) -> None:
        """`broken` is called once when a failure is noticed, before the others are stopped."""
        self._loop = loop
        self._helpers = helpers
        self._between_saves = between_saves
        self._broken = broken
        self._job = job
        self._world_size = world_size
        self._tell = tell
        self._screen = screen
        self._rehearsal = rehearsal
        self._stops = stops
        self._board, self._board_fd = Board.create(world_size)
        self.board_path = f"/proc/{os.getpid()}/fd/{self._board_fd}"
        self._control = Control()
        self._seen = Observed()
        self._group = Group(loop, self._exited)
        self._unknown: frozenset[int] = frozenset()
        """Children that were neither ranks nor helpers at the last look."""
        self._stop_deadline: float | None = None
        self._pace = liveness.Pace()
        limits = liveness.Limits(job.heartbeat.timeout, job.heartbeat.startup)
        self._vigil = HangDetector(self._board, limits, past)
        self.silences: Silences = {}
        """How long its ranks were silent between beats; known when it has ended."""
        self._witness: Witness | None = None
        self._previous = previous

    def run(self, task: Assignment, launcher: Launcher, hear: Hear) -> Outcome:
        """Run it to its end. `hear` gets every event of a rank and returns what to keep of it."""
        self._task, self._hear, self._launcher = task, hear, launcher
        files.write(task.path, task.to_json(), durable=False)
        self._follower = LogFollower(
            self._loop, task.path.parent, self._screen.worker_line, self.hear
        )
        self._seen.last_saved = time.monotonic()
        try:
            launcher.start(task, self._group, cancelled=lambda: bool(self._stops))
            if not self._group.pids:
                return Outcome(False, None, -1, 0)
            self._tell(
                "attempt_started",
                port=task.master_port,
                resume=task.resume.id if task.resume else None,
                step=task.resume.step if task.resume else 0,
                pids={str(rank): pid for rank, pid in self._group.pids.items()},
            )
            written = [Path(task.directory), Path(task.checkpoint.dir)]
            self._witness = Witness(self._group.pids.values(), written)
            self._rehearsal.begin(self._group, self._board, self._change)
            self._loop.every(TICK, self._tick)
            self._loop.every(REAP, self._reap)
            self._watch()
            return self._conclude(launcher)
        finally:
            self._group.stop(0.0)
            if self._witness is not None:
                self._witness.close()
            self._rehearsal.end()
            self._loop.cancel(self._tick)
            self._loop.cancel(self._reap)
            self._follower.close()
            self._board.close()
            os.close(self._board_fd)

    # While it runs

    def _watch(self) -> None:
        while self._group.alive and self._seen.broken_at is None:
            self._loop.run(self._stop_deadline)
            if not self._stops:
                continue
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + self._ask_to_stop()
            if hurried(self._stops) or time.monotonic() >= self._stop_deadline:
                return

    def _ask_to_stop(self) -> float:
        """Ask the ranks to save and stop; returns how many seconds they have for it."""
        beats = self._board.beats()
        if all(beat.step >= 0 for beat in beats):
            self._announce("stop_at")
            return self._job.preemption.grace
        if any(beat.phase is not Phase.NONE for beat in beats):
            return 0.0  # still starting: there is nothing yet that a save could keep
        for rank in self._group.alive:  # no session: the script may have a handler of its own
            self._group.signal(rank, signal.SIGTERM)
        return self._job.preemption.grace

    def save_now(self) -> int | None:
        """Ask the ranks to save; returns after which step, None if they do not train yet."""
        if not all(beat.first_step_time for beat in self._board.beats()):
            return None
        self._announce("save_at")
        return self._control.save_at

    def _announce(self, what: str) -> None:
        step = liveness.agreed_step(self._board.beats(), self._pace.seconds)
        self._change(lambda control: replace(control, **{what: step}))

    def _change(self, change: Callable[[Control], Control]) -> None:
        self._control = change(self._control)
        self._board.ask(self._control)

    def _tick(self) -> None:
        now = time.monotonic()
        beats = self._board.beats()
        first = max(beats, key=lambda beat: beat.step)
        furthest = first.step
        if first.first_step_time:
            self._pace.see(first.step, first.time / 1e9)
        # A rank that was faster than the announcement has passed the step: name a later one.
        if self._control.stop_at >= 0 and furthest > self._control.stop_at:
            self._announce("stop_at")
        every = self._between_saves()
        busy = any(beat.saving for beat in beats)
        if every is not None and not busy and now - self._seen.last_saved >= every:
            stepping = all(beat.first_step_time for beat in beats)
            if stepping and not 0 <= furthest <= self._control.save_at:
                self._announce("save_at")
        if self._seen.broken_at is None:
            hung = self._vigil.look(now, {r: self._group.pids[r] for r in self._group.alive})
            if hung:
                self._hangs(hung, now)
            for rank, ratio in self._vigil.find_stragglers(now, furthest).items():
                self._tell("straggler", rank=rank, ratio=ratio)
                if Kind.STRAGGLER.value in self._job.restart.on and not hung:
                    self._seen.slow[rank] = ratio
                    self._break(now)
        self._end_stuck(now)
        if furthest >= 0:
            self._screen.status(
                furthest,
                rate=self._pace.rate,
                loss=beats[0].loss,
                last_checkpoint=self._seen.checkpointed,
                attempt=self._task.attempt,
                total=self._seen.total,
            )

    def _hangs(self, ranks: list[int], now: float) -> None:
        seen, pids = self._seen, self._group.pids
        seen.hung = ranks
        seen.states = {rank: machine.state(pids[rank]) for rank in ranks}
        seen.beats = self._board.beats()  # one that was stopped goes on to write its stacks
        self._break(now)

    def _reap(self) -> None:
        known = self._launcher.own() | self._helpers() | frozenset(self._group.pids.values())
        unknown = children() - known
        # One that is unknown only now may be introduced in a moment.
        reap(unknown & self._unknown)
        self._unknown = unknown

    def _end_stuck(self, now: float) -> None:
        """Kill ranks that hang in the interpreter's own end; their scripts' results count.

        Seen with torch 2.13: DDP taking down gloo's threads while it holds the GIL they wait for.
        """
        patience, seen = self._job.heartbeat.timeout, self._seen
        for rank in [rank for rank in seen.ended_at if rank in self._group.alive]:
            used = machine.cpu_seconds(self._group.pids[rank])
            before, since = seen.ending.get(rank, (0.0, seen.ended_at[rank]))
            if used > before + CPU_NOISE:
                # It takes its time, as a collection of garbage does on a busy machine.
                since = now
            seen.ending[rank] = used, since
            if now - since > patience and rank not in self._seen.stuck:
                self._seen.stuck.add(rank)
                text = f"rank {rank} did not end within {patience:.1f} s of its script; killed"
                self._tell("warning", text=text)
                self._group.signal(rank, signal.SIGKILL)

    def hear(self, rank: int, event: Event) -> None:
        """An event of `rank`, or of its saver."""
        if event["event"] == "rank_started" and AGENT in self._group.pids:
            self._group.add(rank, event["pid"])
        if not self._seen.hear(rank, event):
            if event["event"] == "rank_ended" and event["code"] not in WELL:
                # Its process takes up to a second to end; nobody has to wait for that.
                self._break(event["mono"])
            return
        kept = self._hear(event)
        if kept is not None:
            fields = {key: value for key, value in kept.items() if key != "event"}
            self._tell(kept["event"], **fields)

    def _exited(self, rank: int, how: Exit) -> None:
        if how.by_us:
            return
        code, number = how.code, how.signal
        if rank in self._seen.stuck:
            code, number = self._seen.codes[rank], None
        elif rank != AGENT and code is None and number is None:  # a child of torchrun
            self._follower.drain()
            code = self._seen.codes.get(rank, 1)
        if rank == AGENT and self._ended_well_but_stuck:
            return  # it complains of a rank that we killed
        if number is not None or code not in WELL:
            self._break(how.mono)

    @property
    def _ended_well_but_stuck(self) -> bool:
        """Whether every script came to its good end, though not every process."""
        codes = self._seen.codes
        well = all(code in WELL for code in codes.values())
        return bool(self._seen.stuck) and well and len(codes) == self._world_size

    def _break(self, mono: float) -> None:
        if self._seen.broken_at is None:
            self._seen.broken_at = mono
            # What the victims print now must not come before the first failing rank's traceback.
            self._follower.quiet = True
            self._broken()

    # When it has ended

    def _conclude(self, launcher: Launcher) -> Outcome:
        if self._seen.hung:
            alive = [rank for rank in self._group.alive if rank != AGENT]
            self._seen.stacks = stacks.collect(self._loop, self._group, alive, self._task.stacks)
        began = time.monotonic()
        grace = 0.0 if hurried(self._stops) else self._job.restart.grace
        try:
            self._group.stop(grace, linger=frozenset([AGENT]))
        except Unkillable:
            self._tell_failure(time.monotonic() - began)
            raise
        launcher.ended()
        end_orphans(launcher.own() | self._helpers())
        stopped = time.monotonic()
        beats = self._board.beats()
        step = max(beat.step for beat in beats)
        failure = self._tell_failure(stopped - began)
        self._follower.quiet = False
        stacks.tidy(map(self._task.stacks, range(self._world_size)))
        self.silences = self._vigil.silences()
        self._tell("gaps", silences=self.silences)
        codes = [how.code for rank, how in self._group.exits.items() if rank != AGENT]
        completed = (
            failure is None
            and self._seen.broken_at is None
            and (len(codes) == self._world_size or AGENT in self._group.exits)
            and all(
                (how.code in (0, None) and not how.by_us)
                or (rank == AGENT and self._ended_well_but_stuck)
                for rank, how in self._group.exits.items()
            )
            and all(code == 0 for code in self._seen.codes.values())
        )
        self._tell(
            "attempt_ended",
            outcome="completed" if completed else "failed" if failure else "interrupted",
            step=step,
            last_step_mono=max(beat.time for beat in beats) / 1e9,
        )
        return Outcome(completed, failure, step, self._seen.checkpointed, self._lived(beats))

    def _tell_failure(self, stop_seconds: float) -> Failure | None:
        """What happened, into the journal; None if nothing did but that it was asked to stop."""
        self._follower.drain()
        if self._seen.broken_at is None or self._stops:
            return None
        beats = self._seen.beats or self._board.beats()
        evidence = gather(self._task, self._group.pids, self._group.exits, beats, self._seen)
        failure = conclude(
            evidence,
            self._seen.hung,
            agent_said(self._task, self._group.exits),
            self._witness.machine() if self._witness is not None else None,
            self._previous,
            self._seen.slow,
        )
        told = described(failure, evidence, self._seen)
        self._tell("failure", **told, lived=self._lived(self._board.beats()))
        if failure.traceback and failure.rank is not None:
            self._screen.traceback(failure.rank, failure.traceback)
        self._tell("group_stopped", seconds=stop_seconds)
        return failure

    def _lived(self, beats: Sequence[Beat]) -> float | None:
        if any(beat.phase is not Phase.NONE for beat in beats):
            return None
        return time.monotonic() - self._seen.last_saved
