"""Getting back from replicas what is damaged or lost here. Nothing unproven takes a file's place.

A manifest proves itself, or is the one whose digest is known; it proves the documents of the parts,
and these prove every byte of the packs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import codec, verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.document import LARGEST_MANIFEST, LARGEST_PART, digest
from autoglm_resume.checkpoint.format.ids import Branch, attempt_of, newest_first
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest, PartRef
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import Chunk
from autoglm_resume.checkpoint.replicas.plan import branches_in, by_run, in_line
from autoglm_resume.checkpoint.storage.storage import Storage, open_storage
from autoglm_resume.checkpoint.store.store import Store, expect
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

_T = TypeVar("_T")


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was brought back, and the run that made it."""

    run: str
    id: str
    files: int
    attempts: int = 0
    """As many as the run has had at least: the next must not count as one before a branch."""


def repair(
    store: Store, id: str, replicas: Sequence[Storage], known: str | None = None
) -> list[Path]:
    """Replace every bad or missing file of `id`, and of what it needs, by a good copy.

    `known` is the digest that its manifest must have, if that is known from elsewhere. Returns the
    files that were replaced. Raises CheckpointError if for one there is no good copy, and OSError
    if the store cannot be written.
    """
    return _Mender(store, replicas).mend(id, known)


def restore_missing(
    store: Store,
    targets: Sequence[str],
    run: str | None = None,
    branches: Collection[Branch] = (),
) -> Restored | None:
    """Bring the newest checkpoint that the targets can give, and what it needs, into `store`.

    Of `run`; without one, of the run that committed last. What is of a branch that was given up, as
    `branches` or any target says, is none. None if no target has a checkpoint. Raises
    CheckpointError if there are some but none is good, OSError if none was found and a
    target could not be asked.
    """
    holders: dict[str, dict[str, list[str]]] = {}
    """Targets that have a manifest, by run and id."""
    branched: dict[str, set[Branch]] = {}
    known = set(branches)
    troubles = []
    for target in targets:
        try:
            names = open_storage(target).names(run or "")
        except OSError as error:
            troubles.append(f"{target}: {error.strerror or error}")
            continue
        for owner, listing in by_run(names).items():
            left = {
                name.removeprefix(f"{owner}/") for name in names if name.startswith(f"{owner}/")
            }
            branched.setdefault(owner, set(known)).update(branches_in(left))
            for id in (id for id in listing if MANIFEST in listing[id]):
                holders.setdefault(owner, {}).setdefault(id, []).append(target)
    if not holders:
        if troubles:
            raise OSError("; ".join(troubles))
        return None
    store.root.mkdir(parents=True, exist_ok=True)
    owner = max(holders, key=lambda owner: _last_commit(store, owner, holders[owner]))
    problem: CheckpointError | None = None
    left_behind = branched[owner]
    numbers = [*map(attempt_of, holders[owner]), *(branch.attempt - 1 for branch in left_behind)]
    for id in in_line(holders[owner], left_behind):
        replicas = [open_storage(target, owner) for target in targets]
        try:
            count = len(_Mender(store, replicas).mend(id, None))
            return Restored(owner, id, count, max(numbers) + 1)
        except CheckpointError as error:
            problem = problem or error
    raise problem or CheckpointError(
        f"{', '.join(targets)}: expected a checkpoint of the run's present branch, found only those"
        f" of branches that were given up: {', '.join(newest_first(holders[owner]))}"
    )


def _last_commit(store: Store, run: str, holders: dict[str, list[str]]) -> float:
    """Time of the newest checkpoint of `run` whose manifest is good; 0 without one."""
    scratch = store.root / f"{files.TEMPORARY}{os.urandom(4).hex()}-{MANIFEST}"
    try:
        for id in newest_first(holders):
            for target in holders[id]:
                try:
                    open_storage(target, run).get(f"{id}/{MANIFEST}", scratch)
                    return _manifest(scratch, id, None).created
                except (OSError, CheckpointError):
                    continue
    finally:
        scratch.unlink(missing_ok=True)
    return 0.0


class _Mender:
    def __init__(self, store: Store, replicas: Sequence[Storage]) -> None:
        self._store = store
        self._replicas = replicas
        self._whole: set[str] = set()

    def mend(self, id: str, known: str | None) -> list[Path]:
        """Make `id` and what it needs whole; returns the files that were fetched."""
        if id in self._whole:
            return []
        self._whole.add(id)
        directory = self._store.directory(id)
        if directory.is_dir():
            return self._fill(id, directory, known)
        # It appears at once, so that a crash leaves no half of it for others to commit.
        new = directory.with_name(f"{files.TEMPORARY}{os.urandom(4).hex()}-{id}")
        new.mkdir(parents=True)
        try:
            fetched = self._fill(id, new, known)
            new.rename(directory)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        files.sync_directory(self._store.root)
        return [directory / path.name if path.parent == new else path for path in fetched]

    def _fill(self, id: str, directory: Path, known: str | None) -> list[Path]:
        fetched: list[Path] = []

        def sure(file: str, prove: Callable[[Path], _T]) -> _T:
            path = directory / file
            try:
                return prove(path)
            except CheckpointError as error:
                problem = error
            found = self._fetch(id, path, prove, problem)
            fetched.append(path)
            return found

        manifest = sure(MANIFEST, partial(_manifest, id=id, known=known))
        for need in reversed(newest_first(manifest.needs)):
            fetched += self.mend(need, None)
        for ref in manifest.parts:
            part = sure(ref.file, partial(_part, ref=ref))
            # Bases of deltas are read where the store has them.
            with ChunkReader(self._store.directory(id), [part]) as bases:
                sure(part.pack, partial(prove_pack, part=part, bases=bases))
        return fetched

    def _fetch(
        self, id: str, path: Path, prove: Callable[[Path], _T], problem: CheckpointError
    ) -> _T:
        """A proven copy of the file, in its place. Raises CorruptCheckpoint without one."""
        candidate = path.with_name(f"{files.TEMPORARY}{os.urandom(4).hex()}-{path.name}")
        name = f"{id}/{path.name}"
        reasons = []
        for replica in self._replicas:
            try:
                replica.get(name, candidate)
                found = prove(candidate)
            except (OSError, CheckpointError) as error:
                reasons.append(f"{replica}: {error}".replace(str(candidate), name))
                continue
            else:
                candidate.replace(path)
                files.sync_directory(path.parent)
                return found
            finally:
                candidate.unlink(missing_ok=True)
        here = problem.message.replace(str(path), str(self._store.directory(id) / path.name))
        raise CorruptCheckpoint(f"{here}; no replica has a good copy: {'; '.join(reasons)}")


def _manifest(path: Path, id: str, known: str | None) -> Manifest:
    with verify.reading(path):
        manifest = Manifest.decode(files.read(path, LARGEST_MANIFEST), str(path))
    expect(path, "id", id, manifest.id)
    if known is not None:
        expect(path, "digest", known, manifest.digest)
    return manifest


def _part(path: Path, ref: PartRef) -> Part:
    with verify.reading(path):
        data = files.read(path, LARGEST_PART)
    expect(path, "digest", ref.digest, digest(data))
    return Part.decode(data, str(path))


def prove_pack(path: Path, part: Part, bases: ChunkReader) -> None:
    """Check every byte of the pack of `part` in the file `path`; older packs come from `bases`.

    Raises CheckpointError.
    """
    own = [(index, chunk) for index, chunk in enumerate(part.chunks) if chunk.pack == 0]
    with verify.reading(path):
        fd = files.opened(path)
    try:
        expect(path, "bytes", part.stored, os.fstat(fd).st_size)

        def prove(number: int, buffer: memoryview) -> None:
            index, chunk = own[number]
            target, stored = buffer[: chunk.raw], memoryview(bytearray(chunk.stored))
            with verify.reading(path):
                count = verify.read_exactly(fd, stored, chunk.offset)
            expect(path, f"bytes of chunk {index}", chunk.stored, count)
            try:
                codec.decode(chunk.codec, stored, target, _base(part, chunk, bases))
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(f"{path}: chunk {index}: {error.message}") from None
            expect(path, f"chunk {index}", chunk.digest, digest(target))

        largest = max((chunk.raw for _, chunk in own), default=0)
        verify.on_threads(len(own), prove, lambda: memoryview(bytearray(largest)))
    finally:
        os.close(fd)


def _base(part: Part, chunk: Chunk, bases: ChunkReader) -> memoryview | None:
    if chunk.base is None:
        return None
    base = part.chunks[chunk.base]
    data = memoryview(bytearray(base.raw))
    bases.read(part, base, data, f"chunk {chunk.base}")
    return data
