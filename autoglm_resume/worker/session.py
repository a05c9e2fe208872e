"""The session: what a training script says to autoglm, in three verbs.

    session = autoglm.init()
    session.track(model=model, optimizer=optimizer)
    for step in session.steps(total):
        ...

It works unchanged under autoglm, under plain torchrun, and alone with python.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import autoglm_resume
from autoglm_resume import events, output
from autoglm_resume.checkpoint.format import structure
from autoglm_resume.checkpoint.format.ids import again, checkpoint_id, newer
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import part_writer
from autoglm_resume.errors import Interrupted, UsageError
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Board, Phase
from autoglm_resume.worker import alone, hooks, imports, leaving, requests, spare
from autoglm_resume.worker.base import forks, settings
from autoglm_resume.worker.base.event_log import EventLog
from autoglm_resume.worker.figures import Figures
from autoglm_resume.worker.membership import Membership
from autoglm_resume.worker.saving.save_manager import SaveManager
from autoglm_resume.worker.state import resuming
from autoglm_resume.worker.state.tracked import TrackedObjects

LINEAGE = 8
"""Checkpoints that a checkpoint names as those before it."""


class Session(Membership):
    """One rank's training, resumable. Made by `autoglm_resume.init`."""

    def __init__(self, chosen: settings.Settings, assignment: Assignment | None) -> None:
        self._settings = chosen
        self._assignment = assignment
        self._store = Store(Path(chosen.checkpoint.dir))
        self._tracked = TrackedObjects()
        self._structure: structure.Structure | None = None
        self._completed = 0
        self._lock = threading.RLock()
        self._found: resuming.Found | None = None
        self._looked = self._resumed = self._stepped = False
        self._saved_step = -1
        self._again = 0
        """Saves that were begun at this step before."""
        self._updates = leaving.Updates(self._tracked, self._warn)
        self._loop = leaving.Loop()
        self._wanted = False
        """Whether the script wants a save once this step is complete."""
        self._lineage: tuple[str, ...] = ()
        self._requests: requests.Requests | None = None
        self._events = EventLog(assignment.events(chosen.rank) if assignment else None, chosen.rank)
        self._pulse = Board.join(assignment.board if assignment else None, chosen.world_size).pulse(
            chosen.rank
        )
        self._figures = Figures(self._pulse, chosen.bounds)
        self._pulse.phase(Phase.START)

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._completed

    def track(self, **objects: Any) -> None:
        """Make `objects` part of every checkpoint: anything with state_dict and load_state_dict.

        Random generators are always part of it. Raises UsageError for anything else, and after
        `resume` or `steps` has begun, or a loader of tracked data.
        """
        if self._looked:
            raise UsageError(
                "session.track() must come before session.steps() or resume(), and before a loader"
                " of what is tracked already is iterated"
            )
        for name, obj in objects.items():
            self._tracked.add(name, obj, self._place, self._where, self._warn)
            self._watch(obj)

    def resume(self) -> int:
        """Load the accepted checkpoint, if any, and return the first step to run.

        Every chunk is verified and the model compared before anything tracked is changed. Raises
        CheckpointError if the checkpoint is not usable; under autoglm the gate then takes an
        older one.
        """
        with self._lock:
            if not self._resumed:
                self._look()
                self._pulse.phase(Phase.RESTORE)
                self._tracked.begin()
                if self._found is not None:
                    self._restore(self._found)
                self._resumed = True
                self._watch()
                self._updates.begin()
                self._tracked.resumed(self._completed, self._warn)
                self._pulse.at(self._completed)
        return self._completed

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps still to run, up to `total` of the whole run, and save at the end.

        A loop that is left by `break` or `return` is at its end, too: what it did is saved. When
        the run is asked to stop, the iteration saves and ends the process with exit code 75.
        Raises UsageError where `total` was asked for before and is complete.
        """
        if self._resumed and self._found and self._loop.begins_anew(total, self._completed):
            known = self._tracked, self._structure, self._saves.held
            resuming.again(self._found, self._store, *known)
        return self._steps(total)

    def _steps(self, total: int) -> Iterator[int]:
        start = self.resume()
        if odd := self._loop.plan(total, start):
            self._warn(odd)
        elif self._assignment is None:
            alone.require_steps(self._settings, start, total)
            alone.require_place(self._settings)
        self._events.emit(events.StepsPlanned(total=total))
        self._tracked.training()
        with leaving.Watched(self._dropped):
            for step in range(start, total):
                self._loop.enter(step, sys._getframe(1))
                yield step
                self._loop.left()
                if self._completed <= step:
                    self.step_done(step)
        self._finish()

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs still to run of the tracked ResumableSampler, and save at the end.

        What a body does after its last `step_done()` belongs to that step, which is complete, and
        saved, only when the body is: an evaluation that is cut off comes again.
        """
        self.resume()
        self._tracked.training()
        with leaving.Watched(self._dropped):
            for epoch in range(self._tracked.epoch(), total):
                self._loop.enter_epoch(sys._getframe(1))
                yield epoch
                self._release()
        self._finish()

    def step_done(self, step: int | None = None, **figures: Any | None) -> None:
        """Say that `step` (counted from 0) is complete; saves if the job's policy says so."""
        if not self._resumed:
            raise UsageError("call session.resume() before the first session.step_done()")
        self._release()
        if figures:
            self.report(**figures)
        step = self._completed if step is None else step
        self._warn(self._loop.count(step, self._completed))
        if self._tracked.step_done() and self._loop.of_epochs:
            self._loop.step = step
        else:
            self._done(step)

    def _release(self) -> None:
        """Complete the last step of an epoch, if it was held back."""
        if self._loop.of_epochs and (step := self._loop.step) is not None:
            self._loop.left()
            self._done(step)

    def _done(self, step: int) -> None:
        self._complete(step)
        assert self._requests is not None
        due = self._requests.at(self._completed)
        every = self._settings.checkpoint.every_steps
        wanted, self._wanted = self._wanted, False
        if due.stop:
            self._stop(self._save_for_certain())
        regular = every is not None and self._completed % every == 0
        if due.save or wanted or (regular and self._saves.due(self._completed)):
            self._save()

    def report(self, **figures: Any | None) -> None:
        """Say what this step is like: numbers or one-element tensors, under any name.

        They are saved with the step, and `checkpoint.keep.best` ranks by them; `loss` and
        `grad_norm` are shown in the heartbeat, too. Reading a tensor on a device waits for the
        device, so that happens once a second at most. Raises UsageError for what is no figure, and
        LossDiverged when losses leave the bounds of the job's `guards`.
        """
        self._figures.report(figures)

    def save(self) -> bool:
        """Save now, after the last completed step; every rank must call it at the same step.

        Returns whether the save is under way: it goes on beside the training, the end of the
        script waits for it, and a run whose last save fails is not complete; a script alone ends
        with exit code 1 then. What is there is saved though the step was before: it may have been
        changed since. Within a step of `steps` the save begins when the step is complete. Raises
        UsageError where an optimizer has stepped since the last `step_done`: that would be the
        state of no step.
        """
        if not self._resumed:
            raise UsageError("call session.resume() before session.save()")
        if self._loop.goes_on(sys._getframe(1)):
            self._wanted = True
            return True
        self._end_of_loop()
        if self._updates.seen:
            raise UsageError(
                "session.save(): an optimizer has stepped since the last session.step_done(): a "
                f"checkpoint of step {self._completed} would hold more than that",
                hint="call session.step_done(step) first, then session.save()",
            )
        self._figures.of_state()
        if self._saved_step == self._completed and not self._renewed():
            return False
        self._save()
        return self._saves.failure(self._id()) is None

    def _complete(self, step: int) -> None:
        """`step` is: everything that follows but for saves."""
        self._figures.step_done()
        self._updates.step_done()
        self._again = 0
        self._completed = completed = step + 1
        self._pulse.completed(completed)
        if not self._stepped:
            self._stepped = True
            if self._assignment is None:
                alone.require_place(self._settings)
            self._events.emit(events.FirstStep(step=completed))
            if self.rank == 0:
                self._events.emit(imports.said(staged=spare.staged))
            self._saves.prepare(self._tracked.state, self._identity())
        self._saves.step_done(completed)

    def _finish(self) -> None:
        # Without its last checkpoint the run would count as finished and its result be lost.
        if (failure := self._save_for_certain()) is not None:
            raise failure
        self._say_finished()

    def _say_finished(self) -> None:
        self._pulse.phase(Phase.DONE)
        self._events.emit(events.Finished(step=self._completed))

    def _end_of_loop(self) -> None:
        """The script has left its loop, within a step that may be complete."""
        self._wanted = False
        if self._loop.step is not None and self._updates.complete:
            if not self._loop.of_epochs:  # which had counted its batch before it was held back
                self._tracked.step_done()
            self._complete(self._loop.step)
        self._loop.left()

    def _dropped(self, script: FrameType | None) -> None:
        """The iterator of the loop was dropped while the frame `script` ran."""
        if leaving.regularly(script):
            self._leave()
        if self._loop.unwinds(script):
            self._loop.left()

    def _leave(self) -> None:
        """The loop was left by the script's own will: that is the end of the training."""
        self._end_of_loop()
        # A failure would go nowhere from here; without a checkpoint the run will not be complete.
        if self._completed and self._save_for_certain() is None:
            self._say_finished()

    def _id(self) -> str:
        return checkpoint_id(self._completed, again(self._settings.token, self._again))

    def _renewed(self) -> bool:
        """Whether what is saved next has a name of its own, though this step was saved before."""
        last = self._lineage[0]
        if self._id() == last:
            self._again += 1
        if newer(self._id(), last):
            self._saved_step = -1
            return True
        output.say(f"{last} cannot be followed by {self._id()}: not saved")
        return False

    def _save(self) -> None:
        if self._saved_step == self._completed:
            return
        began = time.monotonic()
        self._pulse.phase(Phase.SAVE)
        try:
            self._begin_save(began)
            self._saved_step = self._completed
        finally:
            self._lineage = (self._id(), *self._lineage)[:LINEAGE]
            self._pulse.phase(Phase.DATA)

    def _save_for_certain(self) -> part_writer.SaveFailed | None:
        """Save, and return when it is certain what became of it."""
        self._save()
        self._pulse.phase(Phase.SAVE)
        if (failure := self._saves.failure(self._id(), wait=True)) is not None:
            self._begin_save(time.monotonic(), at_once=True)
            failure = self._saves.failure(self._id(), wait=True)
        return failure

    def _begin_save(self, began: float, *, at_once: bool = False) -> None:
        self._saves.begin(self._tracked.state(), self._identity(), began, at_once=at_once)

    def _identity(self) -> capture.Identity:
        return capture.Identity(
            id=self._id(),
            rank=self.rank,
            world_size=self.world_size,
            # A second try of the same save has it in its lineage already.
            lineage=tuple(id for id in self._lineage if id != self._id()),
            model=self._structure,
            rng=True,
            data=self._tracked.deals_data,
            metrics=self._figures.of_completed(),
            origin=self._settings.origin,
            parameters=self._tracked.parameters(),
            versions={"autoglm": autoglm_resume.__version__, **capture.torch_versions()},
        )

    def _look(self) -> None:
        """Pass the gate and read what to go on from; nothing tracked is changed yet."""
        if self._looked:
            return
        self._pulse.phase(Phase.RESTORE)
        self._structure = self._tracked.structure(self._settings.config_files)
        if self._structure is not None:
            self._events.emit(
                events.ModelReported(hash=self._structure.hash, model=self._structure.to_json())
            )
        if self._assignment is None:
            self._settings = alone.agreed(self._settings, self._structure)
        self._saves = SaveManager(self._settings, self._assignment, self._events, self._pulse)
        if self._assignment is None:
            forks.at_exit(self._last_word)
        self._requests = requests.find(self._pulse, self._settings, self._assignment)
        settings, held = self._settings, self._saves.held
        self._found = resuming.find(
            settings, self._store, self._tracked, self._structure, held, self._events
        )
        self._completed = settings.resume.step if settings.resume else 0
        self._looked = True

    def _place(self) -> None:
        """Something that deals data is iterated: put all such where the checkpoint has it.

        The rest waits for `resume`, since what comes before that may still change it.
        """
        with self._lock:
            if not self._resumed:
                self._look()
                if self._found is not None:
                    self._tracked.place(self._found.loading)
                self._pulse.phase(Phase.START)

    def _watch(self, *objects: Any) -> None:
        """With what those of the script's own hold, some only once they are loaded."""
        for obj in (*objects, *self._tracked.unwatched()):
            self._updates.track(obj)
            hooks.watch(obj, self._pulse, self._tracked.gradients.forward)

    def _where(self) -> str:
        return f"{self.rank} {self._completed}"

    def _restore(self, found: resuming.Found) -> None:
        found.into(self._tracked, self._events)
        if found.begins:
            return
        point = found.point
        self._settings = self._settings.of_the_run_of(found.restored.part.origin)
        # What is only in memory yet may never be written: if no step follows, it is saved again.
        self._saved_step = -1 if point.seals else point.step
        self._lineage = (point.id, *found.restored.part.lineage)[:LINEAGE]

    def _last_word(self) -> None:
        """At the end of a process without a supervisor, which would say it."""
        still = self._loop.step is not None
        done = self._completed + (still and self._updates.complete)
        alone.say_if_idle(self._settings, self._stepped, self._completed, self._loop.planned)
        alone.last_word(self._saves.kept(), done, still=still)
        if self._saves.failure(self._id()) is not None:
            alone.end_badly()

    def _stop(self, failure: part_writer.SaveFailed | None) -> NoReturn:
        unsaved = failure.message if failure else ""
        self._events.emit(events.Stopped(step=self._completed, unsaved=unsaved))
        output.flush()
        raise SystemExit(Interrupted.exit_code)
