"""What a reader has opened, committed as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import Protocol

from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CorruptCheckpoint, UsageError

TOKEN = "imported"


class SnapshotSource(Protocol):
    """A checkpoint that lies elsewhere, in whatever layout, and is open."""

    @property
    def step(self) -> int:
        """At which it was saved. Raises CheckpointError."""

    @property
    def raw(self) -> int:
        """Bytes of all tensors of all ranks."""

    def snapshots(self, id: str, progress: verify.Progress | None = None) -> Sequence[Snapshot]:
        """Of all ranks, in order, as checkpoint `id`. Raises CheckpointError.

        `progress` gets the bytes of tensors as they are read and verified.
        """


def adopt(
    store: Store,
    source: SnapshotSource,
    step: int | None = None,
    progress: verify.Progress | None = None,
) -> Manifest:
    """Commit it as a new checkpoint of `store`, of `step` or the step it was saved at.

    `progress` gets the bytes of all tensors of all ranks twice: verified, and written.
    Raises UsageError when that is there already, and CheckpointError, before anything is written,
    when a tensor is not what it was.
    """
    try:
        id = checkpoint_id(source.step if step is None else step, TOKEN)
    except ValueError as error:
        raise CorruptCheckpoint(f"its step is not as written ({error})") from error
    snapshots = source.snapshots(id, progress)
    directory = store.directory(id)
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory}: there already", hint="import it as another --step")
    with suppress(FileNotFoundError):
        store.delete(id)  # left by an import that died
    abandoned = Event()

    def persist(snapshot: Snapshot) -> None:
        try:
            PartWriter(store).persist(snapshot, abandoned)
            if progress:
                progress(snapshot.nbytes)
        except BaseException:
            abandoned.set()
            raise

    try:
        # At once, because what ranks hold alike is shared out among them.
        with ThreadPoolExecutor(len(snapshots)) as pool:
            list(pool.map(persist, snapshots))
        return store.load_manifest(directory)
    except BaseException:
        if directory.exists() and not (directory / MANIFEST).exists():
            store.delete(id)
        raise
