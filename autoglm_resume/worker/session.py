"""The session: what a training script says to autoglm, in three verbs.

    session = autoglm.init()
    session.track(model=model, optimizer=optimizer)
    for step in session.steps(total):
        ...

It works unchanged under autoglm, under plain torchrun, and alone with python.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

import autoglm_resume
from autoglm_resume.checkpoint import restore, retention, saver, snapshot, structure
from autoglm_resume.checkpoint.document import digest
from autoglm_resume.checkpoint.part import age, checkpoint_id
from autoglm_resume.checkpoint.store import Store
from autoglm_resume.errors import (
    CheckpointError,
    CorruptCheckpoint,
    Interrupted,
    ModelMismatch,
    UsageError,
)
from autoglm_resume.worker import hooks, rng, settings, tracked
from autoglm_resume.worker.board import Board, Phase, Pulse
from autoglm_resume.worker.contract import Assignment, ResumePoint
from autoglm_resume.worker.data import ResumableSampler
from autoglm_resume.worker.events import Events
from autoglm_resume.worker.imports import imported_since_start
from autoglm_resume.worker.requests import FromClock, FromRankZero, FromSupervisor, Requests

RNG = "rng"


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
    assignment = Assignment.from_environment()
    if assignment is not None:
        return Session(settings.supervised(assignment), assignment)
    return Session(settings.alone(checkpoint_dir, every_steps, every_seconds, keep), None)


class Session:
    """One rank's training, resumable. Made by `init`."""

    def __init__(self, chosen: settings.Settings, assignment: Assignment | None) -> None:
        self._settings = chosen
        self._supervised = assignment is not None
        self._store = Store(chosen.checkpoint_dir)
        self._tracked: dict[str, Any] = {}
        self._models: dict[str, torch.nn.Module] = {}
        self._structure: structure.Structure | None = None
        self._completed = 0
        self._resumed = False
        self._stepped = False
        self._saved_step = -1
        self._reported = 0.0
        self._lineage: tuple[str, ...] = ()
        self._requests: Requests | None = None
        events = assignment.events(chosen.rank) if assignment else None
        self._events = Events(events, chosen.rank)
        self._pulse = self._find_pulse(assignment)
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
            if name == RNG or name in self._tracked:
                raise UsageError(f"session.track({name}=…): that name is taken")
            if not hasattr(obj, "state_dict") or not hasattr(obj, "load_state_dict"):
                raise UsageError(
                    f"session.track({name}=…): {type(obj).__name__} has no state_dict() and "
                    "load_state_dict()",
                    hint="give it both; they may return and take any plain values and tensors",
                )
            hooks.watch(obj, self._pulse)
            if isinstance(obj, torch.nn.parallel.DistributedDataParallel):
                tracked.never_free(obj)
            self._tracked[name] = obj = tracked.unwrapped(obj)
            if isinstance(obj, torch.nn.Module):
                self._models[name] = obj

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
        self._structure = self._model_structure()
        if self._structure is not None:
            self._events.emit("model", hash=self._structure.hash, model=self._structure.to_json())
        if not self._supervised:
            self._settings = settings.agreed(self._settings, self._structure)
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
        self._events.emit("steps", total=total)
        for step in range(start, total):
            yield step
            self.step_done(step)
        # Without its last checkpoint the run would count as finished and its result be lost.
        if (failure := self._save()) is not None:
            raise failure
        self._pulse.phase(Phase.DONE)
        self._events.emit("finished", step=self._completed)

    def step_done(
        self, step: int, *, loss: Any | None = None, grad_norm: Any | None = None
    ) -> None:
        """Say that `step` (counted from 0) is complete; saves if the job's policy says so."""
        if not self._resumed:
            raise UsageError("call session.resume() before the first session.step_done()")
        if loss is not None or grad_norm is not None:
            self.report(loss=loss, grad_norm=grad_norm)
        for obj in self._tracked.values():
            if isinstance(obj, ResumableSampler):
                obj.advance()
        self._completed = completed = step + 1
        self._pulse.completed(completed)
        if not self._stepped:
            self._stepped = True
            self._events.emit("first_step", step=completed)
            if self.rank == 0:
                self._events.emit("imports", modules=imported_since_start())
        assert self._requests is not None
        due = self._requests.at(completed)
        every = self._settings.every_steps
        if due.save or due.stop or (every is not None and completed % every == 0):
            self.save()
        if due.stop:
            self._stop()

    def report(self, *, loss: Any | None = None, grad_norm: Any | None = None) -> None:
        """Show figures of this step in the heartbeat; numbers or one-element tensors.

        Reading a tensor on a device waits for the device, so that happens once a second at most.
        """
        now = time.monotonic()
        if _on_device(loss) or _on_device(grad_norm):
            if now - self._reported < 1:
                return
            self._reported = now
        self._pulse.report(_number(loss), _number(grad_norm))

    def save(self) -> bool:
        """Save now, after the last completed step; every rank must call it at the same step.

        Returns whether this rank's part is safely on storage. A failed save is reported and
        training goes on: the older checkpoint stays the latest.
        """
        if not self._resumed:
            raise UsageError("call session.resume() before session.save()")
        return self._save() is None

    def _save(self) -> saver.SaveFailed | None:
        if self._saved_step == self._completed:
            return None
        began = time.monotonic()
        self._pulse.phase(Phase.SAVE)
        id = checkpoint_id(self._completed, self._settings.token)
        self._forsake_failed()
        try:
            part = saver.persist(self._snapshot(id), self._store)
        except saver.SaveFailed as error:
            self._events.emit("save_failed", id=id, step=self._completed, reason=str(error))
            with contextlib.suppress(OSError):  # the log may be on the same full disk
                print(f"autoglm: {error}; training goes on", file=sys.stderr)
            return error
        finally:
            self._lineage = (id, *self._lineage)[:8]
            self._pulse.phase(Phase.DATA)
        self._saved_step = self._completed
        self._events.emit(
            "saved",
            id=id,
            step=self._completed,
            seconds=time.monotonic() - began,
            began=began,
            raw=sum(chunk.raw for chunk in part.chunks),
            stored=sum(chunk.stored for chunk in part.chunks),
        )
        # The part is safe; what follows can be done by anybody later, and must not end training.
        with contextlib.suppress(OSError, CheckpointError):
            self._settle(id, began)
        return None

    def _forsake_failed(self) -> None:
        """Give back the room of parts whose checkpoint failed in another rank.

        The newest may only be late; by now every rank is through with the one before it.
        """
        for id in self._lineage[1:]:
            with contextlib.suppress(OSError):
                self._store.forsake(id, self.rank)

    def _settle(self, id: str, began: float) -> None:
        manifest = self._store.commit(id)
        if manifest is not None:
            self._events.emit(
                "committed",
                id=id,
                step=manifest.step,
                digest=manifest.digest,
                began=began,
                objects=manifest.objects,
            )
        if self.rank == 0:
            self._retire(id)

    def _retire(self, saved: str) -> None:
        # Newer ones than this are of another branch, rejected but not corrupt: they must not make
        # this run's checkpoints look old.
        committed = [
            (path.name, age(path.name)[0])
            for path in self._store.committed()
            if age(path.name) <= age(saved)
        ]
        resumed = self._settings.resume
        protected = frozenset([resumed.id]) if resumed else frozenset[str]()
        for id in retention.doomed(committed, self._settings.keep, protected):
            self._store.delete(id)
            self._events.emit("pruned", id=id)

    def _snapshot(self, id: str) -> snapshot.Snapshot:
        states = {name: obj.state_dict() for name, obj in self._tracked.items()}
        states[RNG] = rng.capture()
        return snapshot.take(
            states,
            id=id,
            rank=self.rank,
            world_size=self.world_size,
            lineage=self._lineage,
            model=self._structure,
            rng=True,
            data=any(tracked.deals_data(obj) for obj in self._tracked.values()),
            versions={"autoglm": autoglm_resume.__version__, **snapshot.torch_versions()},
        )

    def _restore(self, point: ResumePoint) -> None:
        began = time.monotonic()
        try:
            path = self._store.directory(point.id)
            found = self._store.load_manifest(path).digest
            if found != point.digest:
                raise CorruptCheckpoint(
                    f"{path}: expected manifest {point.digest} (as the gate saw it), found {found}"
                )
            restored = restore.read(self._store, path, self.rank)
            self._compare(point, restored)
        except CheckpointError as error:
            self._events.emit(
                "refused",
                id=point.id,
                step=point.step,
                kind=type(error).__name__,
                reason=error.message,
            )
            raise
        for name, obj in self._tracked.items():
            obj.load_state_dict(restored.states[name])
        rng.restore(restored.states[RNG])
        self._completed = self._saved_step = point.step
        self._lineage = (point.id,)
        self._events.emit(
            "restored", id=point.id, step=point.step, seconds=time.monotonic() - began
        )

    def _compare(self, point: ResumePoint, restored: restore.RestoredPart) -> None:
        theirs, mine = restored.part.model, self._structure
        if self._settings.check_model and theirs is not None and mine is not None:
            differences = structure.differences(theirs, mine)
            if differences:
                raise ModelMismatch(
                    f"{point.id}: model hash: expected {mine.hash} (this model), found "
                    f"{theirs.hash} in the checkpoint: " + "; ".join(differences)
                )
        missing = [name for name in self._tracked if name not in restored.states]
        if missing:
            raise CheckpointError(
                f"{point.id}: holds {', '.join(sorted(restored.states))}; this script also tracks "
                f"{', '.join(missing)}",
                hint="track the same objects as before, or start over with --fresh",
            )

    def _model_structure(self) -> structure.Structure | None:
        if not self._models:
            return None
        tensors = {
            f"{name}.{key}": value
            for name, model in self._models.items()
            for key, value in model.state_dict().items()
        }
        config = {path: digest(Path(path).read_bytes()) for path in self._settings.config_files}
        return snapshot.structure_of(tensors, config)

    def _stop(self) -> NoReturn:
        self._events.emit("stopped", step=self._completed)
        sys.stdout.flush()
        raise SystemExit(Interrupted.exit_code)

    def _find_pulse(self, assignment: Assignment | None) -> Pulse:
        if assignment is None:
            board, _ = Board.create(self.world_size)
        else:
            board = Board.open(Path(assignment.board))
        return board.pulse(self.rank)

    def _find_requests(self) -> Requests:
        if self._supervised:
            return FromSupervisor(self._pulse, self.rank)
        if self.world_size > 1 and torch.distributed.is_initialized():
            return FromRankZero(self.rank, self._settings.every_seconds)
        return FromClock(self._settings.every_seconds if self.world_size == 1 else None)


def _on_device(value: Any | None) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _number(value: Any | None) -> float | None:
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return None if value is None else float(value)
