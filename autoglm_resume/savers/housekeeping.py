"""What follows a save: saying so, giving back the room of failed ones, and retiring old ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Set
from contextlib import suppress

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import newer
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.store import retention
from autoglm_resume.checkpoint.store.commit import commit
from autoglm_resume.checkpoint.store.gate import superseded
from autoglm_resume.checkpoint.store.retention import RetentionEntry
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import Saved, forsake
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint
from autoglm_resume.protocol.assignment import Checkpointing


def announce(tell: events.Tell, saved: Saved, *, began: float, blocked: float) -> None:
    """`began` is when training was first held up for it, `blocked` for how many seconds."""
    part, manifest = saved.part, saved.manifest
    tell(
        events.PartSaved(
            id=part.id,
            step=part.step,
            seconds=time.monotonic() - began,
            began=began,
            blocked=blocked,
            raw=part.raw,
            stored=part.stored,
            shared=part.shared,
        )
    )
    if manifest is not None:
        tell(
            events.Committed(
                id=manifest.id,
                step=manifest.step,
                digest=manifest.digest,
                began=began,
                objects=manifest.objects,
            )
        )


def tidy(
    store: Store, how: Checkpointing, snapshot: Snapshot, stay: Set[str], tell: events.Tell
) -> None:
    """After `snapshot` was saved. `stay` are ids of checkpoints that must not be deleted.

    Raises OSError, CheckpointError.
    """
    # The newest may only be late in another rank; by now all are through with those before it.
    for id in reversed(snapshot.lineage[1:]):
        with suppress(OSError):  # whole, but it cannot be committed now: a full disk
            if not _whole(store, id):
                forsake(store, id, snapshot.rank)
    if snapshot.rank == 0:
        for id in _retire(store, how, snapshot, stay):
            tell(events.Pruned(id=id))


def _of_another_run(manifest: Manifest, snapshot: Snapshot) -> bool:
    """As far as both say; those of older versions do not."""
    theirs, ours = manifest.origin, snapshot.origin
    return theirs is not None and ours is not None and theirs.run != ours.run


def _whole(store: Store, id: str) -> bool:
    """Whether nothing but a manifest was missing of checkpoint `id`, which has one now."""
    with suppress(CheckpointError):
        return not store.directory(id).is_dir() or commit(store, id) is not None
    return False


def _retire(store: Store, how: Checkpointing, snapshot: Snapshot, stay: Set[str]) -> list[str]:
    """Delete what no rule keeps, now that `snapshot` is saved; returns the ids."""
    saved = snapshot.id
    found: list[RetentionEntry] = []
    # What the gate rejected and left in place may be newer than all that is this run's own.
    line = (saved, *snapshot.lineage)
    own = (id for id in line if (store.directory(id) / MANIFEST).exists())
    protected = {*stay, *itertools.islice(own, 1)}
    for path in store.committed():
        try:
            manifest = store.load_manifest(path)
        except CorruptCheckpoint:
            continue
        except CheckpointError:  # of a newer version, or unreadable now: what may it need?
            protected.update(each.name for each in store.committed() if newer(path.name, each.name))
        else:
            ours = manifest.id == path.name and not _of_another_run(manifest, snapshot)
            if ours and not newer(path.name, saved):
                given_up = superseded(path.name, how.branches) is not None
                found.append(RetentionEntry.of(manifest, given_up=given_up))
            else:
                # Of another branch or run, rejected but not corrupt, or somebody's copy: it must
                # not make this run's own checkpoints look old, nor lose what it needs, nor is it
                # ours to delete.
                protected.update(manifest.needs)
    gone = retention.doomed(found, how.keep, frozenset(protected), time.time())
    for id in gone:
        store.delete(id)
    return gone
