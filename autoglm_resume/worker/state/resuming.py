"""What there is to go on from: read and compared first, loaded into what a script tracks later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from autoglm_resume import events, output
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state.restore import RestoredPart
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError
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
    began = time.monotonic()
    with _refusing(point, log):
        restored = restoring.read(
            point,
            store,
            settings.rank,
            settings.world_size,
            tracked.objects,
            settings.checkpoint.rename,
            held,
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
