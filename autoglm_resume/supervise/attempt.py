"""One attempt: launch the worker group, watch it, and say how it ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoglm_resume import events
from autoglm_resume.errors import Unkillable
from autoglm_resume.events import Event
from autoglm_resume.failures import Kind
from autoglm_resume.protocol.heartbeats import Beat, Control, Phase
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.core import liveness, result
from autoglm_resume.supervise.core.diagnosis import conclude
from autoglm_resume.supervise.core.evidence import RankEvidence
from autoglm_resume.supervise.core.failure import Failure, Previous
from autoglm_resume.supervise.core.liveness import Limits
from autoglm_resume.supervise.core.stragglers import Stragglers
from autoglm_resume.supervise.evidence.collect import described
from autoglm_resume.supervise.node import Node, Order
from autoglm_resume.supervise.ranks.fault_injector import FaultInjector
from autoglm_resume.supervise.ranks.group import Exit
from autoglm_resume.supervise.ranks.observed import Observed

TICK = 0.25
"""Seconds between looks at the beats; exits and events are noticed at once, without it."""


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
    unsaved: str = ""
    """Why its last save failed, if it did."""


class Attempt:
    """One attempt, on one node."""

    def __init__(
        self,
        context: RunContext,
        node: Node,
        order: Order,
        faults: FaultInjector,
        between_saves: Callable[[], float | None],
        previous: Failure | Previous | None,
        broken: Callable[[], None],
        kept: Callable[[], int],
        heard: Callable[[int, Event], None],
    ) -> None:
        """`between_saves` are seconds, None where only steps count. `broken` is called once when
        a failure is noticed, before the others are stopped; `kept` says of which step the newest
        checkpoint is once every save has ended; `heard` gets every event of a rank.
        """
        self._context = context
        self._job = context.job
        self._stops = context.stops
        self._tell = context.tell
        self._node = node
        self._order = order
        self._faults = faults
        self._between_saves = between_saves
        self._previous = previous
        self._noticed = broken
        self._kept = kept
        self.heard = heard
        heartbeat = context.job.heartbeat
        self._limits = Limits(heartbeat.timeout, heartbeat.startup)
        self._seen = Observed()
        self._rate = liveness.StepRate()
        self._stragglers = Stragglers()
        self._control = Control()
        self._stop_deadline: float | None = None
        self._began = 0.0
        self._launched = False

    def run(self) -> Outcome:
        """Run it to its end. Raises UsageError for what its start needs, and Unkillable."""
        loop, resume = self._context.loop, self._order.resume
        self._seen.last_saved = self._began = time.monotonic()
        try:
            launched = self._node.start(self._order, self)
            if not launched.pids:
                return Outcome(False, None, -1, 0)
            # The launcher may have waited for its imports first, in which no rank lived.
            self._seen.last_saved = self._began = time.monotonic()
            self._launched = True
            self._tell(
                events.AttemptStarted(
                    port=launched.port,
                    resume=resume.id if resume else None,
                    step=resume.step if resume else 0,
                    pids=dict(launched.pids),
                )
            )
            self._faults.begin(self._node, self._change)
            loop.every(TICK, self._tick)
            self._watch()
            return self._conclude()
        finally:
            self._faults.end()
            loop.cancel(self._tick)
            self._node.ended()

    # While it runs

    def _watch(self) -> None:
        while self._node.alive and self._seen.broken_at is None:
            self._context.loop.run(self._stop_deadline)
            if not self._stops:
                continue
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + self._ask_to_stop()
            if self._stops.hurried() or time.monotonic() >= self._stop_deadline:
                return

    def _ask_to_stop(self) -> float:
        """Ask the ranks to save and stop; returns how many seconds they have for it."""
        beats = self._node.beats()
        if all(beat.step >= 0 for beat in beats):
            self._announce("stop_at")
            return self._job.preemption.grace
        if any(beat.phase is not Phase.NONE for beat in beats):
            return 0.0  # still starting: there is nothing yet that a save could keep
        for rank in self._node.alive:  # no session: the script may have a handler of its own
            self._node.signal(rank, signal.SIGTERM)
        return self._job.preemption.grace

    def save_now(self) -> int | None:
        """Ask the ranks to save; returns after which step, None if they do not train yet."""
        # While the launcher waits for its imports, there are no ranks to ask.
        if not self._launched or not all(b.first_step_time for b in self._node.beats()):
            return None
        self._announce("save_at")
        return self._control.save_at

    def _announce(self, what: str) -> None:
        step = liveness.agreed_step(self._node.beats(), self._rate.seconds)
        self._change(lambda control: replace(control, **{what: step}))

    def _change(self, change: Callable[[Control], Control]) -> None:
        self._control = change(self._control)
        self._node.announce(self._control)

    def _tick(self) -> None:
        self._context.screen.tick()
        now = time.monotonic()
        beats = self._node.beats()
        first = max(beats, key=lambda beat: beat.step)
        if first.first_step_time:
            self._rate.see(first.step, first.time / 1e9)
        # A rank that was faster than the announcement has passed the step: name a later one.
        if self._control.stop_at >= 0 and first.step > self._control.stop_at:
            self._announce("stop_at")
        if self._save_is_due(beats, first.step, now):
            self._announce("save_at")
        if self._seen.broken_at is None:
            self._look_for_trouble(now, first.step)
        if first.step >= 0:
            self._context.screen.status(
                first.step,
                rate=self._rate.rate,
                loss=beats[0].loss,
                last_checkpoint=self._seen.checkpointed,
                attempt=self._order.number,
                total=self._seen.total,
            )

    def _save_is_due(self, beats: Sequence[Beat], furthest: int, now: float) -> bool:
        every = self._between_saves()
        if every is None or now - self._seen.last_saved < every:
            return False
        busy = any(beat.saving for beat in beats)
        stepping = all(beat.first_step_time for beat in beats)
        return stepping and not busy and not 0 <= furthest <= self._control.save_at

    def _look_for_trouble(self, now: float, furthest: int) -> None:
        hung = liveness.hung(self._node.looks(now), now, self._limits)
        if hung:
            self._seen.hung = hung
            self._seen.states = self._node.condemn(hung, now)
            self._seen.beats = self._node.beats()  # a stopped one goes on to write its stacks
            self._break(now)
        for rank, ratio in self._stragglers.look(now, furthest, self._node.spent()).items():
            self._tell(events.Straggler(rank=rank, ratio=ratio))
            if Kind.STRAGGLER.value in self._job.restart.on and not hung:
                self._seen.slow[rank] = ratio
                self._break(now)

    def observe(self, rank: int, event: Event) -> bool:
        """What a rank or its saver said of this attempt; whether it concerns others too."""
        before = self._seen.broken_at
        concerns_others = self._seen.hear(rank, event)
        if before is None and self._seen.broken_at is not None:
            self._broken()
        return concerns_others

    def exited(self, rank: int, how: Exit) -> None:
        """The process of `rank` has ended, not by us, and not well."""
        self._break(how.mono)

    def _break(self, mono: float) -> None:
        if self._seen.failed(mono):
            self._broken()

    def _broken(self) -> None:
        self._node.broken()
        self._noticed()

    # When it has ended

    def _conclude(self) -> Outcome:
        node, seen = self._node, self._seen
        self._faults.end()  # no drill strikes what is being stopped
        if seen.hung:
            seen.stacks = node.stacks()
        began = time.monotonic()
        try:
            hurried = self._stops.hurried()
            node.stop(0.0 if hurried else self._job.restart.grace, at_once=hurried)
        except Unkillable:
            self._tell_failure(time.monotonic() - began)
            raise
        stopped = time.monotonic()
        beats = node.beats()
        step = max(beat.step for beat in beats)
        failure = self._tell_failure(stopped - began)
        completed = failure is None and seen.broken_at is None and node.well
        if completed and (failure := self._missing(step)) is not None:
            seen.failed(stopped)
            self._tell_concluded(failure, node.evidence(seen).ranks, 0.0)
            completed = False
        self._tell(events.SilencesMeasured(silences=node.ended()))
        self._tell(
            events.AttemptEnded(
                outcome="completed" if completed else "failed" if failure else "interrupted",
                step=step,
                last_step_mono=max(beat.time for beat in beats) / 1e9,
            )
        )
        lived = self._lived(beats)
        return Outcome(completed, failure, step, seen.checkpointed, lived, seen.unsaved)

    def _missing(self, step: int) -> Failure | None:
        """Why the run is not complete though every script is."""
        resume = self._order.resume
        kept, seen = self._kept(), self._seen
        return result.missing(resume.step if resume else 0, step, kept, seen.total, seen.unsaved)

    def _tell_failure(self, stop_seconds: float) -> Failure | None:
        """What happened, into the journal; None if nothing did but that it was asked to stop."""
        seen = self._seen
        if seen.broken_at is None or self._stops:
            return None
        evidence = self._node.evidence(seen)
        failure = conclude(
            evidence.ranks,
            seen.hung,
            evidence.agent,
            evidence.machine,
            self._previous,
            seen.slow,
        )
        self._tell_concluded(failure, evidence.ranks, stop_seconds)
        return failure

    def _tell_concluded(
        self, failure: Failure, ranks: Sequence[RankEvidence], stop_seconds: float
    ) -> None:
        lived = self._lived(self._node.beats())
        self._tell(described(failure, ranks, self._seen, lived))
        if failure.traceback and failure.rank is not None:
            self._context.screen.traceback(failure.rank, failure.traceback)
        self._tell(events.GroupStopped(seconds=stop_seconds))

    def _lived(self, beats: Sequence[Beat]) -> float | None:
        if any(beat.phase is not Phase.NONE for beat in beats):
            return None
        return time.monotonic() - self._began
