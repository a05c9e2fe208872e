"""What there is to go on from: read and compared first, loaded into what a script tracks later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from autoglm_resume import events, output
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state.restore import RestoredPart
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, ObjectMismatch
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.worker.base.event_log import EventLog
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.state import fitting, restoring
from autoglm_resume.worker.state.pending_gradients import GRADIENTS
from autoglm_resume.worker.state.tracked import TrackedObjects


@dataclass(frozen=True)
class Found:
    """A checkpoint that fits what is tracked. Reading it took `seconds`."""

    point: ResumePoint
    settings: Settings
    restored: RestoredPart
    loading: fitting.Loading
    seconds: float
    begins: bool = False
    """Whether the run begins with these objects, rather than goes on from there."""

    def into(self, tracked: TrackedObjects, log: EventLog) -> ResumePoint:
        """Load, but for what was placed before, and continue the random generators."""
        began = time.monotonic()
        point, restored, loading = self.point, self.restored, self.loading
        rank, world_size = self.settings.rank, self.settings.world_size
        with _refusing(point, log):
            tracked.load(loading)
        if loading.partial and rank == 0:
            log.emit(loading.said().but(id=point.id, step=point.step))
            loading.tell(point.id)
        for text in loading.remarks() if rank == 0 else ():
            log.emit(events.WarningGiven(text=text))
            output.say(text)
        if self.begins:
            return point
        tracked.gradients.put_back(restored.states.get(GRADIENTS, {}))
        restoring.generators(restored, rank)
        if restored.part.world_size != world_size and rank == 0:
            said = restoring.resharded(restored, world_size, tracked.objects)
            log.emit(said.but(id=point.id, step=point.step))
            if restored.led:
                output.say(restoring.told_of_buffers(said.rank_zeros))
        log.emit(
            events.StateRestored(
                id=point.id,
                step=point.step,
                seconds=self.seconds + time.monotonic() - began,
                memory=restored.from_memory,
                sealed=bool(point.seals),
            )
        )
        return point


def find(
    settings: Settings,
    store: Store,
    tracked: TrackedObjects,
    model: Structure | None,
    held: Callable[[str], Snapshot | None],
    log: EventLog,
) -> Found | None:
    """What to go on from, or to begin with; None if that is what the script makes.

    Raises CheckpointError as `read` does.
    """
    if (point := settings.resume) is not None:
        return read(point, store, settings, tracked, model, held(point.id), log)
    if (begins := settings.begins) is None:
        return None
    path, only = Path(begins.path), begins.only or (*tracked.objects,)
    point = ResumePoint(path.name, begins.step, begins.digest)
    others = tuple(name for name in tracked.objects if name not in only)
    chosen = replace(settings, checkpoint=replace(settings.checkpoint, skip=others))
    with _refusing(point, log):
        if lost := [name for name in only if name not in tracked.objects]:
            raise ObjectMismatch(
                f"--only {lost[0]}: the script tracks {', '.join(tracked.objects) or 'nothing'}"
            )
        try:
            found = _read(point, Store(path.parent), chosen, tracked, model, None)
        except CheckpointError as error:
            # Nobody else has another one to offer: that is for a person.
            raise ObjectMismatch(f"--init-from {error.message}", hint=error.hint) from error
    return replace(found, begins=True)


def again(
    found: Found,
    store: Store,
    tracked: TrackedObjects,
    model: Structure | None,
    held: Callable[[str], Snapshot | None],
) -> None:
    """Load what was loaded, once more: a script that passes over the epochs that are complete does
    what it does besides in each, and a scheduler would have stepped, a generator been drawn from.

    It is read anew, since objects may hold on to what they were given. Raises CheckpointError.
    """
    quiet = EventLog(None, found.settings.rank)
    if not found.begins:
        read(found.point, store, found.settings, tracked, model, held(found.point.id), quiet).into(
            tracked, quiet
        )


def read(
    point: ResumePoint,
    store: Store,
    settings: Settings,
    tracked: TrackedObjects,
    model: Structure | None,
    held: Snapshot | None,
    log: EventLog,
) -> Found:
    """The checkpoint at `point`, out of memory where its snapshot is `held`. Changes nothing.

    Raises CheckpointError if it is damaged or does not fit, once that is in the log.
    """
    with _refusing(point, log):
        return _read(point, store, settings, tracked, model, held)


def _read(
    point: ResumePoint,
    store: Store,
    settings: Settings,
    tracked: TrackedObjects,
    model: Structure | None,
    held: Snapshot | None,
) -> Found:
    began = time.monotonic()
    rename, skip = settings.checkpoint.rename, settings.checkpoint.skip
    wanted = {name: obj for name, obj in tracked.objects.items() if name not in skip}
    restored = restoring.read(
        point, store, settings.rank, settings.world_size, wanted, rename, held
    )
    loading = fitting.fitted(point.id, restored, tracked.objects, model, settings)
    return Found(point, settings, restored, loading, time.monotonic() - began)


@contextmanager
def _refusing(point: ResumePoint, log: EventLog) -> Iterator[None]:
    """Have it in the log why the checkpoint at `point` will not do."""
    try:
        yield
    except CheckpointError as error:
        log.emit(
            events.Refused(
                id=point.id,
                step=point.step,
                sealed=bool(point.seals),
                kind=type(error).__name__,
                reason=error.message,
                hint=error.hint,
            )
        )
        raise
