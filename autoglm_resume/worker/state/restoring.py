"""A checkpoint's state for the objects that a script tracks, whoever saved it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_resume.checkpoint.format import renaming
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state import reshard, restore
from autoglm_resume.checkpoint.state.restore import OtherSharding, RestoredPart
from autoglm_resume.checkpoint.state.sharding import Present
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CorruptCheckpoint, WorldSizeMismatch
from autoglm_resume.events import Resharded
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.worker.base import rng
from autoglm_resume.worker.feed.sampler import ResumableSampler
from autoglm_resume.worker.state.grouping import listed
from autoglm_resume.worker.state.parameters import buffers_of

RNG = "rng"
"""The object that every rank has one of its own of."""


def read(
    point: ResumePoint,
    store: Store,
    rank: int,
    world_size: int,
    objects: Mapping[str, Any],
    rename: Mapping[str, str],
    held: Snapshot | None,
) -> RestoredPart:
    """What `objects` are to be now; from memory where the snapshot is still `held`, else from
    storage, and from all ranks' parts if it was made by another number of them.

    Buffers of modules that other ranks had otherwise are rank 0's. `rename` is used only to find
    out how tensors are sharded now. Raises CheckpointError.
    """

    def renamed(name: str) -> str:
        return renaming.renamed(name.replace("/", ".", 1), rename).replace(".", "/", 1)

    present = Present(objects, renamed)
    if point.seals:
        return _from_memory(point, rank, present, held)
    path = store.directory(point.id)
    manifest = store.load_manifest(path)
    if manifest.digest != point.digest:
        raise CorruptCheckpoint(
            f"{path}: expected manifest {point.digest} (as the gate saw it), found"
            f" {manifest.digest}"
        )
    if manifest.world_size == world_size:
        with contextlib.suppress(OtherSharding):
            if held is not None:
                with contextlib.suppress(CorruptCheckpoint):
                    return restore.read(store, path, rank, present=present, memory=held)
            return restore.read(store, path, rank, present=present)
    restored = reshard.read(store, path, rank, present, own=[RNG], led=buffers_of(objects))
    for name, obj in objects.items():
        if isinstance(obj, ResumableSampler) and name in restored.states:
            _require_samples(f"{restored.part.id}: {name}", restored.states[name], world_size)
    return restored


def _from_memory(
    point: ResumePoint, rank: int, present: Present, held: Snapshot | None
) -> RestoredPart:
    """Raises CorruptCheckpoint whatever is wrong: from storage it may be good."""
    try:
        if held is not None:
            return restore.read_sealed(held, point.seals[rank], present=present)
    except OtherSharding as error:
        raise CorruptCheckpoint(f"{error.message} (only in memory yet)") from error
    raise CorruptCheckpoint(f"{point.id}: rank {rank}: its snapshot is not in memory any more")


def _require_samples(what: str, state: Mapping[str, Any], world_size: int) -> None:
    left = state["size"] - state["consumed"]
    if left < world_size:
        raise WorldSizeMismatch(
            f"{what}: {left} samples are left in epoch {state['epoch']}, not one for each of"
            f" {world_size} ranks",
            hint=f"go on with at most {left} ranks until the next epoch, or from an older"
            " checkpoint (autoglm resume --from STEP)",
        )


def generators(restored: RestoredPart, rank: int) -> None:
    """Continue this rank's random generators; one that is new gets its own from the checkpoint."""
    if RNG in restored.states:
        rng.restore(restored.states[RNG])
    else:
        rng.derive(f"{restored.part.objects[RNG]} rank {rank}")


def resharded(restored: RestoredPart, now: int, objects: Mapping[str, Any]) -> Resharded:
    """What changes when a checkpoint of other ranks goes on with `now` of them; not which.

    A step consumes `global_batch` samples from now on: the batches of the ranks keep their size.
    """
    samplers = [obj for obj in objects.values() if isinstance(obj, ResumableSampler)]
    before = restored.part.world_size
    batches = [s.batch_size * s.batches_per_step * now for s in samplers]
    return Resharded(
        from_=before,
        to=now,
        global_batch=batches[0] if len(batches) == 1 else None,
        seeded_anew=tuple(range(before, now)),
        rank_zeros=tuple(sorted(restored.led)),
    )


def told_of_buffers(names: Sequence[str]) -> str:
    """That ranks go on with other buffers than they had."""
    return (
        f"ranks had different buffers, and all go on with rank 0's, as DistributedDataParallel has"
        f" it: {listed(names)}"
    )
