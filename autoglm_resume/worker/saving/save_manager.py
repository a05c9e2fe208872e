"""When a session saves and what becomes of it; with a saver, or, where there is none, without."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from autoglm_resume import events, output
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state.capture import CapturedState, Identity
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed
from autoglm_resume.errors import CheckpointError
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Pulse
from autoglm_resume.savers import directory_lock, housekeeping
from autoglm_resume.worker.base.event_log import EventLog
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.saving.cost import StepTimes
from autoglm_resume.worker.saving.stager import NoSaver, SaveOutcome, Stager


class SaveManager:
    """The saves of one session."""

    def __init__(
        self, settings: Settings, assignment: Assignment | None, events: EventLog, pulse: Pulse
    ) -> None:
        self._settings = settings
        self._events = events
        self._pulse = pulse
        self._supervised = assignment is not None
        self._store = Store(Path(settings.checkpoint.dir))
        self._direct: PartWriter | None = None
        self._stager: Stager | None = None
        self._failures: dict[str, SaveFailed] = {}
        self._kept = settings.resume.step if settings.resume else 0
        self._times = StepTimes()
        self._warned: set[str] = set()
        if settings.checkpoint.memory:
            name = assignment.savers[settings.rank] if assignment else None
            self._stager = Stager(settings, name, pulse.alive)

    def held(self, id: str | None) -> Snapshot | None:
        """This rank's snapshot of checkpoint `id`, if it is still in memory."""
        # Without a supervisor the saver is this process's own, and new: no use to wait for it.
        return self._stager.held(id) if self._stager and self._supervised else None

    def prepare(self, state: Callable[[], CapturedState], identity: Identity) -> None:
        """Get ready for saves of states like this one."""
        if self._stager is not None:
            self._stager.prepare(state(), identity)

    def take_in(self) -> None:
        """Take in what became of the save under way. Raises SaveFailed if the job wants that."""
        if self._stager is None:
            return
        for outcome in self._stager.outcomes():
            self._conclude(outcome)
        self._pulse.saving(self._stager.busy)
        if self._settings.checkpoint.on_error == "stop" and self._failures:
            raise next(iter(self._failures.values()))

    def step_done(self, step: int) -> None:
        """Like `take_in`, once in every step: what saves cost training is seen here."""
        self.take_in()
        busy = self._stager is not None and self._stager.busy
        self._cost(self._times.step(time.monotonic(), busy=busy), step)

    def _cost(self, seconds: float | None, step: int) -> None:
        if seconds is not None and self._settings.rank == 0:
            self._events.emit(events.SaveFelt(step=step, seconds=seconds))

    def due(self, step: int) -> bool:
        """Whether to save after `step`, as the job's policy has it; all ranks get the same answer.

        A save that falls due while the last one is under way in any rank is left out.
        """
        self.take_in()
        # Ranks without a supervisor share no board, and no journal tells of a save left out.
        waits = not self._supervised or self._settings.checkpoint.on_busy == "wait"
        if self._stager is None or waits:
            return True
        save = self._pulse.agree(step)
        if not save and self._settings.rank == 0:
            self._events.emit(events.SaveSkipped(step=step, reason="the last one is under way"))
        return save

    def begin(
        self, state: CapturedState, identity: Identity, began: float, *, at_once: bool = False
    ) -> None:
        """Save `state`; see `Stager.begin`. `failure` tells whether that went wrong."""
        self._failures.clear()
        self._cost(self._times.begin(), step_of(identity.id))
        if self._stager is not None:
            try:
                self._stager.begin(state, identity, began, at_once=at_once)
            except NoSaver as error:
                self._warn("memory", str(error))
            else:
                self._warn("memory", self._stager.short)
                self._warn("timing", self._stager.slow)
                return
        self._save_directly(state, identity, began)

    def failure(self, id: str, *, wait: bool = False) -> SaveFailed | None:
        """Why checkpoint `id` failed, if it did; with `wait`, when that is certain."""
        if self._stager is not None and wait:
            self._stager.wait()
        with contextlib.suppress(SaveFailed):
            self.take_in()
        return self._failures.get(id)

    def kept(self) -> int:
        """The newest step whose state this rank has saved, or began with, when that is certain."""
        self.failure("", wait=True)
        return self._kept

    def _save_directly(self, state: CapturedState, identity: Identity, began: float) -> None:
        if self._direct is None:
            self._direct = PartWriter(self._store, self._settings.checkpoint.options, share=False)
        snapshot = state.in_place(identity)
        # Whoever starts in the same directory meanwhile would take it for something abandoned.
        with directory_lock.persisting(self._store.root):
            try:
                saved = self._direct.persist(snapshot)
            except SaveFailed as error:
                self._conclude(SaveOutcome(identity.id, False, str(error)))
                return
            self._conclude(SaveOutcome(identity.id, True))
            blocked = time.monotonic() - began
            housekeeping.announce(self._events.emit, saved, began=began, blocked=blocked)
            self._direct.forget_memory()
            # The part is safe; what follows anybody can do later, and must not end training.
            with contextlib.suppress(OSError, CheckpointError):
                stay = {self._settings.resume.id} if self._settings.resume else set()
                how = self._settings.checkpoint
                housekeeping.tidy(self._store, how, snapshot, stay, self._events.emit)

    def _conclude(self, outcome: SaveOutcome) -> None:
        if outcome.ok:
            self._kept = max(self._kept, step_of(outcome.id))
            return
        failure = SaveFailed(outcome.reason)
        self._failures[outcome.id] = failure
        if not outcome.told:
            self._events.emit(
                events.PartFailed(id=outcome.id, step=step_of(outcome.id), reason=outcome.reason)
            )
        output.say(f"{outcome.reason}; training goes on")

    def _warn(self, of: str, text: str) -> None:
        if text and of not in self._warned:
            self._warned.add(of)
            self._events.emit(events.WarningGiven(text=f"snapshots in memory: {text}"))
