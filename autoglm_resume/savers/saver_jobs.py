"""What a saver does beside its loop, one job after the other: memory, and snapshots to storage."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from autoglm_resume import events
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.errors import CheckpointError
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.protocol.saver_messages import Message
from autoglm_resume.protocol.shared_memory import Slots, slots_fitting
from autoglm_resume.savers import directory_lock, housekeeping

REST = 10.0
"""Seconds that a save is left alone at most, while ranks start."""


class SaverJobs:
    """For one rank after the other, all with the same number; run by one thread beside the loop."""

    def __init__(self, tell: events.Tell) -> None:
        """`tell` gets what becomes of saves."""
        self._tell = tell
        self.slots: Slots | None = None
        self._writer: PartWriter | None = None
        self._how: Checkpointing | None = None
        self._resumed: str | None = None
        """Id of the checkpoint that the rank began with."""
        self.protected: frozenset[str] = frozenset()
        """Ids that retention must keep."""
        self.may_work = threading.Event()
        """Unset while ranks start and need the processors."""
        self.may_work.set()

    @property
    def several_slots(self) -> bool:
        """Whether the next snapshot leaves this one where it is."""
        return self.slots is not None and self.slots.count > 1

    def obey(self, request: Message) -> None:
        """A rank said hello by `request`: its rules hold from now on, for a save under way too."""
        self._how = Checkpointing.from_json(request["checkpoint"])
        self._resumed = request["resume"]

    def begin(self, request: Message, *, follow: bool) -> None:
        """Get ready for that rank's saves; `follow`: what it resumed from is not in memory."""
        how = Checkpointing.from_json(request["checkpoint"])
        store = Store(Path(how.dir))
        if self._writer is None or self._writer.store.root != store.root:
            self._writer = PartWriter(store)
        self._writer.options = how.options
        self._writer.between = self._rest
        if follow:
            rank, world_size = request["rank"], request["world_size"]
            self._writer.follow(_previous(store, request["resume"], rank, world_size))

    def _rest(self) -> None:
        if not self.may_work.wait(REST):
            self.may_work.set()

    def fits(self, size: int, count: int) -> bool:
        """Whether the slots that are there will do for `count` snapshots of `size` bytes."""
        slots = self.slots
        return slots is not None and slots.size >= size and slots.count == count

    def allocate(self, size: int, count: int) -> str:
        """New slots, as many as there is room for; returns why not all."""
        if self.slots is not None:
            if self._writer is not None:
                self._writer.forget_memory()
            self.slots.close()
            self.slots = None
        # All savers share a log, which is as good a thing to lock as any.
        self.slots, reason = slots_fitting(size, count, sys.stdout.fileno())
        return reason

    def save(
        self,
        snapshot: Snapshot,
        request: Message,
        abandoned: threading.Event,
        sealed: Callable[[Snapshot, Sequence[str]], None],
        saved: Callable[[str], None],
    ) -> None:
        """Persist what `request` handed over, unless it is `abandoned`, and retire older ones.

        `sealed` gets the digests of its chunks once they are known, `saved` why it failed, if so.
        """
        assert self._writer is not None
        with directory_lock.persisting(self._writer.store.root):
            saved(self._persisted(self._writer, snapshot, request, abandoned, sealed))
            with contextlib.suppress(OSError, CheckpointError):
                assert self._how is not None
                stay = self.protected | ({self._resumed} if self._resumed else frozenset())
                housekeeping.tidy(self._writer.store, self._how, snapshot, stay, self._tell)

    def _persisted(
        self,
        writer: PartWriter,
        snapshot: Snapshot,
        request: Message,
        abandoned: threading.Event,
        sealed: Callable[[Snapshot, Sequence[str]], None],
    ) -> str:
        """Persist it; returns why that failed, if so."""
        slots = self.slots
        try:
            written = writer.persist(snapshot, abandoned, lambda names: sealed(snapshot, names))
        except SaveFailed as error:
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        else:
            if slots is not None and slots.count == 1:
                writer.forget_memory()  # the next snapshot overwrites it
            began, blocked = request["began"], request["blocked"]
            housekeeping.announce(self._tell, written, began=began, blocked=blocked)
            return ""
        if not abandoned.is_set():
            self._tell(events.PartFailed(id=snapshot.id, step=snapshot.step, reason=reason))
        return reason


def _previous(store: Store, id: str | None, rank: int, world_size: int) -> PreviousPart | None:
    """What the next part may refer to after a restart; its tensors are in memory no more."""
    if id is None:
        return None
    with contextlib.suppress(CheckpointError, OSError):
        path = store.directory(id)
        if (path / MANIFEST).exists() and store.load_manifest(path).world_size == world_size:
            return PreviousPart(store.load_part(path, rank))
    return None
