"""The session: what a training script says to autoglm, in three verbs.

    session = autoglm.init()
    session.track(model=model, optimizer=optimizer)
    for step in session.steps(total):
        ...

It works unchanged under autoglm, under plain torchrun, and alone with python.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

import autoglm_resume
from autoglm_resume import events, output
from autoglm_resume.checkpoint.format import structure
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import part_writer
from autoglm_resume.errors import (
    CheckpointError,
    Interrupted,
    UsageError,
)
from autoglm_resume.protocol.assignment import Assignment, ResumePoint
from autoglm_resume.protocol.heartbeats import Board, Phase, Pulse
from autoglm_resume.worker import alone, fitting, hooks, imports, restoring, spare
from autoglm_resume.worker.base import settings
from autoglm_resume.worker.base.event_log import EventLog
from autoglm_resume.worker.figures import Figures
from autoglm_resume.worker.requests import FromClock, FromRankZero, FromSupervisor, Requests
from autoglm_resume.worker.saving.save_manager import SaveManager
from autoglm_resume.worker.tracked import TrackedObjects

LINEAGE = 8
"""Checkpoints that a checkpoint names as those before it."""


def init(
    *,
    checkpoint_dir: str | None = None,
    every_steps: int | None = None,
    every_seconds: float | None = None,
    keep: int = settings.DEFAULT_KEEP,
) -> Session:
    """Begin this process's session; call it once, in every rank.

    Under autoglm the job file decides about checkpoints. The arguments are for the same script
    under plain torchrun or alone: where checkpoints go (default `checkpoints/<script>`), how often
    (default every 300 s), and how many are kept.
    """
    spare.refuse_session()
    output.fill_descriptors()  # before a pack is opened under the number of standard error
    assignment = Assignment.from_environment()
    if assignment is not None:
        return Session(settings.supervised(assignment), assignment)
    return Session(settings.unsupervised(checkpoint_dir, every_steps, every_seconds, keep), None)


class Session:
    """One rank's training, resumable. Made by `init`."""

    def __init__(self, chosen: settings.Settings, assignment: Assignment | None) -> None:
        self._settings = chosen
        self._assignment = assignment
        self._store = Store(Path(chosen.checkpoint.dir))
        self._tracked = TrackedObjects()
        self._structure: structure.Structure | None = None
        self._completed = 0
        self._resumed = False
        self._stepped = False
        self._saved_step = -1
        self._lineage: tuple[str, ...] = ()
        self._requests: Requests | None = None
        self._events = EventLog(assignment.events(chosen.rank) if assignment else None, chosen.rank)
        self._pulse = self._find_pulse(assignment)
        self._figures = Figures(self._pulse, chosen.bounds)
        self._pulse.phase(Phase.START)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._settings.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._settings.world_size

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._completed

    def track(self, **objects: Any) -> None:
        """Make `objects` part of every checkpoint: anything with state_dict and load_state_dict.

        Random generators are always part of it. Raises UsageError for anything else, and after
        `resume` or `steps` has begun.
        """
        if self._resumed:
            raise UsageError("session.track() must come before session.steps() or resume()")
        for name, obj in objects.items():
            self._tracked.add(name, obj)
            hooks.watch(obj, self._pulse, self._training_forward)

    def resume(self) -> int:
        """Load the accepted checkpoint, if any, and return the first step to run.

        Every chunk is verified and the model compared before anything tracked is changed. Raises
        CheckpointError if the checkpoint is not usable; under autoglm the gate then takes an
        older one.
        """
        if self._resumed:
            return self._completed
        self._resumed = True
        self._pulse.phase(Phase.RESTORE)
        self._structure = self._tracked.structure(self._settings.config_files)
        if self._structure is not None:
            self._events.emit(
                events.ModelReported(hash=self._structure.hash, model=self._structure.to_json())
            )
        if self._assignment is None:
            self._settings = alone.agreed(self._settings, self._structure)
        self._saves = SaveManager(self._settings, self._assignment, self._events, self._pulse)
        self._requests = self._find_requests()
        point = self._settings.resume
        if point is not None:
            self._restore(point)
        self._pulse.at(self._completed)
        return self._completed

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps still to run, up to `total`, and save at the end.

        When the run is asked to stop, the iteration saves and ends the process with exit code 75.
        """
        start = self.resume()
        self._events.emit(events.StepsPlanned(total=total))
        for step in range(start, total):
            yield step
            self.step_done(step)
        # Without its last checkpoint the run would count as finished and its result be lost.
        if (failure := self._save_for_certain()) is not None:
            raise failure
        self._pulse.phase(Phase.DONE)
        self._events.emit(events.Finished(step=self._completed))

    def step_done(
        self, step: int, *, loss: Any | None = None, grad_norm: Any | None = None
    ) -> None:
        """Say that `step` (counted from 0) is complete; saves if the job's policy says so."""
        if not self._resumed:
            raise UsageError("call session.resume() before the first session.step_done()")
        if loss is not None or grad_norm is not None:
            self.report(loss=loss, grad_norm=grad_norm)
        for sampler in self._tracked.samplers:
            sampler.advance()
        self._figures.step_done()
        self._completed = completed = step + 1
        self._pulse.completed(completed)
        if not self._stepped:
            self._stepped = True
            self._events.emit(events.FirstStep(step=completed))
            if self.rank == 0:
                self._events.emit(
                    events.ModulesImported(
                        modules=tuple(imports.imported_since_start()),
                        own=tuple(imports.own_since_start()),
                        staged=spare.staged,
                    )
                )
            self._saves.prepare(self._tracked.state, self._identity())
        self._saves.take_in()
        assert self._requests is not None
        due = self._requests.at(completed)
        every = self._settings.checkpoint.every_steps
        if due.stop:
            self._save_for_certain()
            self._stop()
        elif due.save or (
            every is not None and completed % every == 0 and self._saves.due(completed)
        ):
            self._save()

    def report(self, *, loss: Any | None = None, grad_norm: Any | None = None) -> None:
        """Show figures of this step in the heartbeat; numbers or one-element tensors.

        Reading a tensor on a device waits for the device, so that happens once a second at most.
        Raises LossDiverged when losses leave the bounds of the job's `guards`.
        """
        self._figures.report(loss, grad_norm)

    def save(self) -> bool:
        """Save now, after the last completed step; every rank must call it at the same step.

        Waits for the save before, and returns whether this one is under way: it goes on beside
        the training. One that fails later is reported, and the older checkpoint stays the latest.
        """
        if not self._resumed:
            raise UsageError("call session.resume() before session.save()")
        self._save()
        return self._saves.failure(self._id()) is None

    def _training_forward(self) -> None:
        if self._resumed:
            self._saves.start_copy()

    def _id(self) -> str:
        return checkpoint_id(self._completed, self._settings.token)

    def _save(self) -> None:
        if self._saved_step == self._completed:
            return
        began = time.monotonic()
        self._pulse.phase(Phase.SAVE)
        try:
            self._begin_save(self._tracked.safe_until_step(), began)
            self._saved_step = self._completed
        finally:
            self._lineage = (self._id(), *self._lineage)[:LINEAGE]
            self._pulse.phase(Phase.DATA)

    def _save_for_certain(self) -> part_writer.SaveFailed | None:
        """Save, and return when it is certain what became of it."""
        self._save()
        self._pulse.phase(Phase.SAVE)
        if (failure := self._saves.failure(self._id(), wait=True)) is not None:
            self._begin_save(frozenset(), time.monotonic())
            failure = self._saves.failure(self._id(), wait=True)
        return failure

    def _begin_save(self, safe: frozenset[int], began: float) -> None:
        self._saves.begin(self._tracked.state(), self._identity(), safe, began)

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
            versions={"autoglm": autoglm_resume.__version__, **capture.torch_versions()},
        )

    def _restore(self, point: ResumePoint) -> None:
        began = time.monotonic()
        try:
            restored = restoring.read(
                point,
                self._store,
                self.rank,
                self.world_size,
                self._tracked.objects,
                self._tracked.led,
                self._settings.checkpoint.rename,
                self._saves.held(point.id),
            )
            loading = fitting.fitted(
                point.id, restored, self._tracked.objects, self._structure, self._settings
            )
        except CheckpointError as error:
            self._events.emit(
                events.Refused(
                    id=point.id,
                    step=point.step,
                    sealed=bool(point.seals),
                    kind=type(error).__name__,
                    reason=error.message,
                )
            )
            raise
        loading.into(self._tracked.objects)
        if loading.partial and self.rank == 0:
            self._events.emit(loading.said().but(id=point.id, step=point.step))
            loading.tell(point.id)
        restoring.generators(restored, self.rank)
        if restored.part.world_size != self.world_size and self.rank == 0:
            count = restored.part.world_size
            said = restoring.resharded(count, self.world_size, self._tracked.objects)
            self._events.emit(said.but(id=point.id, step=point.step))
        self._completed = point.step
        # What is only in memory yet may never be written: if no step follows, it is saved again.
        self._saved_step = -1 if point.seals else point.step
        self._lineage = (point.id, *restored.part.lineage)[:LINEAGE]
        self._events.emit(
            events.StateRestored(
                id=point.id,
                step=point.step,
                seconds=time.monotonic() - began,
                memory=restored.from_memory,
                sealed=bool(point.seals),
            )
        )

    def _stop(self) -> NoReturn:
        self._events.emit(events.Stopped(step=self._completed))
        output.flush()
        raise SystemExit(Interrupted.exit_code)

    def _find_pulse(self, assignment: Assignment | None) -> Pulse:
        if assignment is None:
            board, _ = Board.create(self.world_size)
        else:
            board = Board.open(Path(assignment.board))
        return board.pulse(self.rank)

    def _find_requests(self) -> Requests:
        if self._assignment is not None:
            return FromSupervisor(self._pulse, self.rank)
        if self.world_size > 1 and torch.distributed.is_initialized():
            return FromRankZero(self.rank, self._settings.every_seconds)
        return FromClock(self._settings.every_seconds if self.world_size == 1 else None)
