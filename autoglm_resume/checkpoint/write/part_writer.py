"""Snapshot to storage: hash, share, encode, write, read back, and only then show it.

A pack appears under its name after every byte of it has been read from the disk, decoded and
compared. Encoding, writing, flushing and reading back overlap (see pack_writer.py).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from autoglm_resume import files, linux
from autoglm_resume.checkpoint.chunks import casts, verify
from autoglm_resume.checkpoint.chunks.compression import Throughput
from autoglm_resume.checkpoint.chunks.cut import Item, items_of
from autoglm_resume.checkpoint.format.document import LARGEST_PART, digest_of_digests
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.part import Part, pack_file, part_file
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import (
    CHUNK_BYTES,
    Pack,
    Tensor,
    object_digest,
    object_of,
)
from autoglm_resume.checkpoint.store.commit import commit
from autoglm_resume.checkpoint.store.store import Store, entries
from autoglm_resume.checkpoint.write import chunk_ownership
from autoglm_resume.checkpoint.write.pack_writer import THREADS, Packer
from autoglm_resume.checkpoint.write.reuse import ChunkTable, PreviousPart, Sharing
from autoglm_resume.errors import AutoglmError, CheckpointError

T = TypeVar("T")

GIVEN_UP = "given up, because not all ranks have a snapshot of it"
RETRIES = (0.5, 2.0)
"""Seconds before each further try of a write that failed for a reason that may pass."""

_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),
}


class SaveFailed(AutoglmError):
    """A checkpoint could not be written; the older ones are untouched."""


@dataclass(frozen=True)
class Saved:
    """This rank's part, and the manifest if the checkpoint is complete."""

    part: Part
    manifest: Manifest | None


class PartWriter:
    """Persists the snapshots of one rank, one after the other."""

    def __init__(
        self, store: Store, options: SaveOptions | None = None, *, share: bool = True
    ) -> None:
        """With `share`, what ranks hold alike is stored once; their savers wait for each other."""
        self.store = store
        self.options = options or SaveOptions()
        self._share = share
        self.between: Callable[[], None] = lambda: None
        """Called between two chunks; may take its time, and raise."""
        self._throughput = Throughput()
        self._previous: PreviousPart | None = None

    def follow(self, previous: PreviousPart | None) -> None:
        """The next part may refer to this one."""
        self._previous = previous

    def forget_memory(self) -> None:
        """The tensors of the last snapshot are about to be overwritten: no base of deltas."""
        if self._previous is not None:
            self._previous = PreviousPart(self._previous.part)

    def persist(
        self,
        snapshot: Snapshot,
        abandoned: Event | None = None,
        named: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> Saved:
        """Write and verify this rank's part, then commit the checkpoint if it was the last one.

        Gives up when `abandoned` is set; `named` gets the digests of all chunks, in order, before
        anything is written. Raises SaveFailed naming the file, the bytes needed and
        the bytes free; nothing half written is left then. (If only the commit failed, the parts
        stay, and a later commit can still succeed.)
        """
        abandoned = abandoned or Event()
        file = self.store.directory(snapshot.id) / pack_file(snapshot.rank)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="encode") as pool:
            items = list(pool.map(Item.named, items_of(snapshot)))
            # Whoever gave it up may overwrite the snapshot; digests of that would be good ones.
            if abandoned.is_set():
                raise _failure(CheckpointError(GIVEN_UP), file, snapshot.nbytes)
            named([item.name for item in items])
            return retried(
                lambda: self._persist(snapshot, items, pool, abandoned),
                file,
                snapshot.nbytes,
                abandoned,
            )

    def _persist(
        self, snapshot: Snapshot, items: list[Item], pool: Executor, abandoned: Event
    ) -> Saved:
        directory = self.store.directory(snapshot.id)
        file = directory / part_file(snapshot.rank)
        if file.exists():
            # An earlier try wrote it and failed to commit; a part is never written twice.
            part = Part.decode(files.read(file, LARGEST_PART), str(file))
        else:
            make_directory(directory)
            part = self._write(snapshot, items, pool, directory, abandoned)
        manifest = commit(self.store, snapshot.id)
        if manifest is not None and self._share:
            with suppress(OSError):
                chunk_ownership.retract(directory, snapshot.world_size)
        tensors = {tensor.name: tensor.data for tensor in snapshot.tensors}
        self._previous = PreviousPart(part, tensors)
        return Saved(part, manifest)

    def _write(
        self,
        snapshot: Snapshot,
        named: list[Item],
        pool: Executor,
        directory: Path,
        abandoned: Event,
    ) -> Part:
        file = directory / part_file(snapshot.rank)
        pack = directory / pack_file(snapshot.rank)
        deadline = time.monotonic() + self.options.timeout

        def check() -> None:
            self.between()
            if abandoned.is_set():
                raise CheckpointError(GIVEN_UP)
            if time.monotonic() > deadline:
                raise CheckpointError(f"not done within {self.options.timeout:.0f} s")

        previous = self._previous if self._usable(self._previous) else None
        table = ChunkTable(snapshot.id, previous)
        compress = self.options.compress
        try:
            found = casts.find(snapshot.tensors, named, pool)
            items = [item for item in named if item.position not in found]
            names = {item.name for item in items}
            deltas = compress == "small" and previous is not None and bool(previous.tensors)
            limit = self.options.keyframe_every
            sharing = Sharing(previous, limit, names, deltas=deltas)
            peers = frozenset[str]()
            if self._share and snapshot.world_size > 1:
                peers = self._share_out(snapshot, directory, items, abandoned)
            with files.writing(pack) as output:
                packer = Packer(output, sharing, table, peers, self._throughput)
                rows = packer.write(items, pool, compress, check)
            for position, each in found.items():
                sources = tuple(rows[source] for source in each.sources)
                item = each.item
                rows[position] = table.cast(item.name, len(item.raw), item.dtype, sources)
            # The fingerprint is taken after the rename, which changes the ctime.
            part = part_of(snapshot, table, Pack(snapshot.id, verify.fingerprint(pack)), rows)
            files.write(file, part.encode())
        except BaseException:
            discard(file, pack)
            raise
        return part

    def _share_out(
        self, snapshot: Snapshot, directory: Path, items: list[Item], abandoned: Event
    ) -> frozenset[str]:
        mine = {item.position: item.name for item in items}
        chunk_ownership.publish(directory, snapshot.rank, mine)
        return chunk_ownership.left_to_peers(
            directory, snapshot.rank, snapshot.world_size, mine, abandoned
        )

    def _usable(self, previous: PreviousPart | None) -> bool:
        """Only a committed checkpoint is sure to stay while this one needs it."""
        if previous is None:
            return False
        ids = (previous.part.id, *previous.part.needs)
        return all((self.store.directory(id) / MANIFEST).exists() for id in ids)


def retried(write: Callable[[], T], file: Path, needed: int, abandoned: Event) -> T:
    """What `write` returns, tried again where that may help, unless `abandoned` is set.

    Raises SaveFailed naming `file`, the bytes needed and the bytes free.
    """
    for pause in (*RETRIES, None):
        try:
            return write()
        except OSError as error:
            lasting = error.errno in _LASTING or pause is None
            if lasting or abandoned.wait(pause):
                raise _failure(error, file, needed) from error
        except CheckpointError as error:
            raise _failure(error, file.parent, needed) from error
    raise AssertionError("the last try returns or raises")


def part_of(
    snapshot: Snapshot, table: ChunkTable, own: Pack, rows: Mapping[tuple[str, int], int]
) -> Part:
    """The part of `snapshot` whose chunks are in `table`, at `rows`; `own` pack is on storage."""
    packs, chunks = table.finish(own)
    tensors = []
    for entry in snapshot.tensors:
        count = -(-entry.nbytes // CHUNK_BYTES)
        indices = tuple(rows[entry.name, index] for index in range(count))
        content = digest_of_digests(chunks[index].digest for index in indices)
        tensors.append(Tensor(entry.name, entry.dtype, entry.shape, content, indices))
    tables: dict[str, list[Tensor]] = {name: [] for name in snapshot.trees}
    for tensor in tensors:
        tables[object_of(tensor.name)].append(tensor)
    return Part(
        id=snapshot.id,
        step=snapshot.step,
        rank=snapshot.rank,
        world_size=snapshot.world_size,
        lineage=snapshot.lineage,
        created=snapshot.created,
        versions=snapshot.versions,
        model=snapshot.model,
        objects={name: object_digest(snapshot.trees[name], tables[name]) for name in tables},
        state=snapshot.trees,
        tensors=tuple(tensors),
        chunks=chunks,
        packs=packs,
        rng=snapshot.rng,
        data=snapshot.data,
        metrics=snapshot.metrics,
        origin=snapshot.origin,
        parameters=snapshot.parameters,
    )


def make_directory(directory: Path) -> None:
    """Make a checkpoint's directory, and its root, durably."""
    root = directory.parent
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        files.sync_directory(root.parent)
    directory.mkdir(exist_ok=True)
    # By every rank, because the one that made it may die before this.
    files.sync_directory(root)


def forsake(store: Store, id: str, rank: int) -> None:
    """Remove `rank`'s part of a checkpoint that never came about; a committed one stays."""
    directory = store.directory(id)
    if directory.is_dir() and not (directory / MANIFEST).exists():
        # And what a saver that was killed left under temporary names.
        mine = (part_file(rank), pack_file(rank), chunk_ownership.claim_file(rank))
        for path in entries(directory):
            if path.name.endswith(mine):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks may still have theirs
            directory.rmdir()


def discard(*paths: Path) -> None:
    """Remove what was half written, as far as the file system lets us."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _failure(error: Exception, file: Path, needed: int) -> SaveFailed:
    hint = "training goes on, and the checkpoint before stays the latest"
    if not isinstance(error, OSError):
        return SaveFailed(f"{file}: not saved: {error}", hint=hint)
    free = "an unknown number"
    with suppress(OSError):
        free = f"{linux.free_bytes(file):,}"
    return SaveFailed(
        f"{file}: not saved: {error.strerror}; it needs {needed:,} bytes, {free} are free there",
        hint=hint,
    )
