"""The directory of checkpoints: commit, examine, quarantine, delete.

    <root>/step-0000000030.a1/rank-00000.pack   encoded chunks, one after another
                              rank-00000.json   the part: state tree, tensor and chunk tables
                              manifest.json     the checkpoint exists if and only if this does
           quarantine/<id>/…                    what failed, with a reason.json

Nothing in it is ever modified in place. Checkpoints are untrusted input here: no pickle, and no
bytes that make these functions raise anything but CheckpointError.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import QUARANTINE, Reader, pack_path
from autoglm_resume.checkpoint.chunks.verify import Progress
from autoglm_resume.checkpoint.format.document import digest, indented
from autoglm_resume.checkpoint.format.ids import attempt_of, is_id, recency, step_of
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest, Parent, PartRef, needs_of
from autoglm_resume.checkpoint.format.part import Part, pack_file, part_file
from autoglm_resume.checkpoint.store.gate import Facts, Integrity
from autoglm_resume.checkpoint.write.chunk_ownership import claim_file
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, WorldSizeMismatch

REASON = "reason.json"
PART_FILE = re.compile(r"rank-\d{5,}\.json\Z")


class Store:
    """Checkpoints under `root`, which need not exist yet. Holds no state of its own.

    All methods raise OSError when the file system fails, and CheckpointError as they say.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def directory(self, id: str) -> Path:
        """Where checkpoint `id` is, or would be."""
        step_of(id)  # never a path that leads elsewhere
        return self.root / id

    def committed(self) -> list[Path]:
        """Directories that have a manifest, readable or not, newest first."""
        return [path for path in self._all() if (path / MANIFEST).exists()]

    def uncommitted(self) -> list[Path]:
        """Directories without a manifest, newest first."""
        return [path for path in self._all() if not (path / MANIFEST).exists()]

    def latest(self) -> Path | None:
        """The newest committed directory, unproven."""
        return next(iter(self.committed()), None)

    def next_attempt(self) -> int:
        """A number larger than every attempt that left something here, in quarantine too."""
        names = [path.name for path in (*self._all(), *self.quarantined()) if is_id(path.name)]
        return max(map(attempt_of, names), default=-1) + 1

    def _all(self) -> list[Path]:
        found = [path for path in _entries(self.root) if is_id(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: recency(path.name), reverse=True)

    # Commit

    def commit(self, id: str) -> Manifest | None:
        """Write the manifest of `id` if all parts are there; None if some are missing.

        Any rank may call it at any time, and so may the supervisor; the first writer wins and all
        get the same manifest. Older checkpoints that only lack theirs are committed first, so the
        chain is not broken by whoever died in between.
        Raises CorruptCheckpoint when the parts are damaged or disagree.
        """
        directory = self.directory(id)
        if (directory / MANIFEST).exists():
            return self.load_manifest(directory)
        found = _all_parts(directory)
        if found is None:
            return None
        lineage = found[0][0].lineage
        for ancestor in reversed(lineage):
            path = self.directory(ancestor)
            with suppress(CheckpointError):
                if path.is_dir() and not (path / MANIFEST).exists() and (old := _all_parts(path)):
                    self._write_manifest(path, old)
        return self._write_manifest(directory, found)

    def complete(self, fits: Callable[[Manifest], bool] = lambda _: True) -> list[Manifest]:
        """Commit every directory whose parts are all there; returns what was committed.

        For the supervisor, before the gate, when no rank is alive. What does not fit the run is
        left as it is.
        """
        done: list[Manifest] = []
        for path in reversed(self.uncommitted()):
            with suppress(CheckpointError):
                found = _all_parts(path)
                if found and fits(self._manifest(found)) and (manifest := self.commit(path.name)):
                    done.append(manifest)
        return done

    def whole(self) -> list[Facts]:
        """Facts of uncommitted directories that lack only their manifest, newest first."""
        facts = []
        for path in self.uncommitted():
            with suppress(CheckpointError):
                if found := _all_parts(path):
                    manifest = self._manifest(found)
                    parts = tuple(part for part, _ in found)
                    facts.append(_facts(path, manifest, parts, Integrity(True, "fingerprint")))
        return facts

    def _manifest(self, found: list[tuple[Part, bytes]]) -> Manifest:
        parts, documents = zip(*found, strict=True)
        # A rank that missed one announced save has another lineage from there on.
        common = [id for id in parts[0].lineage if all(id in part.lineage for part in parts)]
        return Manifest.of(parts, documents, self._parent(common))

    def _write_manifest(self, directory: Path, found: list[tuple[Part, bytes]]) -> Manifest:
        manifest = self._manifest(found)
        try:
            files.write(directory / MANIFEST, manifest.encode(), replace=False)
        except FileExistsError:
            return self.load_manifest(directory)
        return manifest

    def _parent(self, lineage: Iterable[str]) -> Parent | None:
        for ancestor in lineage:
            with suppress(CheckpointError):
                return Parent(ancestor, self.load_manifest(self.directory(ancestor)).digest)
        return None

    # Read

    def load_manifest(self, path: Path) -> Manifest:
        """Of the checkpoint in `path`, verified against its own digest.

        Raises CheckpointError.
        """
        file = path / MANIFEST
        with verify.reading(file):
            data = file.read_bytes()
        return Manifest.decode(data, str(file))

    def load_part(self, path: Path, rank: int) -> Part:
        """Rank `rank`'s part of the checkpoint in `path`, verified against the manifest.

        Raises CheckpointError.
        """
        manifest = self.load_manifest(path)
        if rank >= manifest.world_size:
            raise WorldSizeMismatch(
                f"{path / MANIFEST}: expected a part of rank {rank}, found {manifest.world_size}"
                " parts"
            )
        return self._part(path, manifest, manifest.parts[rank])

    def parts_for(self, path: Path, part: Part) -> list[Part]:
        """The parts that reading `part` takes: all of them where ranks share chunks.

        Raises CheckpointError.
        """
        if not any(chunk.with_peer for chunk in part.chunks):
            return [part]
        manifest = self.load_manifest(path)
        return [
            part if ref.rank == part.rank else self._part(path, manifest, ref)
            for ref in manifest.parts
        ]

    def _part(self, path: Path, manifest: Manifest, ref: PartRef) -> Part:
        file = path / ref.file
        with verify.reading(file):
            data = file.read_bytes()
        if (found := digest(data)) != ref.digest:
            raise CorruptCheckpoint(f"{file}: expected {ref.digest}, found {found}")
        part = Part.decode(data, str(file))
        _expect(file, "id", manifest.id, part.id)
        _expect(file, "rank", ref.rank, part.rank)
        _expect(file, "world size", manifest.world_size, part.world_size)
        _expect(file, "raw bytes", ref.raw, part.raw)
        _expect(file, "stored bytes", ref.stored, part.stored)
        _expect(file, "shared bytes", ref.shared, part.shared)
        _expect(file, "objects", ref.objects, part.objects)
        return part

    def examine(self, path: Path, *, deep: bool = False, progress: Progress | None = None) -> Facts:
        """Everything the gate wants to know; what is wrong is in `integrity`, never raised.

        A pack whose stat fingerprint is what the saver recorded after reading it back is trusted;
        otherwise, or with `deep`, every chunk is read and checked. `progress` gets bytes done.
        """
        manifest: Manifest | None = None
        parts: list[Part] = []
        how: Literal["fingerprint", "content"] = "fingerprint"
        problem, unreadable = "", False
        try:
            manifest = self.load_manifest(path)
            _expect(path / MANIFEST, "id", path.name, manifest.id)
            _check_chain(path, manifest)
            for ref in manifest.parts:
                parts.append(self._part(path, manifest, ref))
            for part in parts:
                if deep or not _untouched(path, part):
                    how = "content"
                    with Reader(path, parts) as reader:
                        verify.on_one_part(part, reader.read, progress)
            _expect(path / MANIFEST, "needs", manifest.needs, needs_of(parts))
        except CheckpointError as error:
            problem, unreadable = error.message, not isinstance(error, CorruptCheckpoint)
        return _facts(path, manifest, parts, Integrity(not problem, how, problem, unreadable))

    def candidates(self, deep: bool = False, progress: Progress | None = None) -> Iterator[Facts]:
        """Facts of the committed checkpoints, newest first, each found out when asked for."""
        for path in self.committed():
            yield self.examine(path, deep=deep, progress=progress)

    # Remove

    def quarantine(self, id: str, reason: str) -> Path:
        """Move checkpoint `id` out of the way, and write down why; returns where it is now."""
        source = self.directory(id)
        shelter = self.root / QUARANTINE
        shelter.mkdir(exist_ok=True)
        target = shelter / id
        suffix = 1
        while target.exists():
            suffix += 1
            target = shelter / f"{id}.{suffix}"
        source.rename(target)
        files.sync_directory(shelter)
        files.sync_directory(self.root)
        note = {"id": id, "reason": reason, "quarantined": time.time()}
        # The note is a courtesy: a full disk must not stop the fallback to an older checkpoint.
        with suppress(OSError):
            files.write(target / REASON, indented(note))
        return target

    def quarantined(self) -> list[Path]:
        """Directories in quarantine, by name."""
        return sorted(path for path in _entries(self.root / QUARANTINE) if path.is_dir())

    def delete(self, id: str) -> None:
        """Remove checkpoint `id`, committed or not.

        It vanishes by one rename. Unlinking the manifest alone would leave parts that the next
        `complete` commits again, perhaps without a parent that is deleted by then: another
        manifest than the one whose digest the next checkpoint of the chain has recorded.
        """
        grave = self.root / f"{files.TEMPORARY}{id}"
        if grave.exists():
            _remove(grave)
        self.directory(id).rename(grave)
        files.sync_directory(self.root)
        _remove(grave)

    def forsake(self, id: str, rank: int) -> None:
        """Remove `rank`'s part of a checkpoint that never came about; a committed one stays."""
        directory = self.directory(id)
        if directory.is_dir() and not (directory / MANIFEST).exists():
            # And what a saver that was killed left under temporary names.
            mine = (part_file(rank), pack_file(rank), claim_file(rank))
            for path in _entries(directory):
                if path.name.endswith(mine):
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # other ranks may still have theirs
                directory.rmdir()

    def abandoned(self) -> list[Path]:
        """Uncommitted directories that lack a part, and temporary files.

        Ask when no rank or saver is alive: theirs look the same.
        """
        whole = {facts.id for facts in self.whole()}
        found = [path for path in self.uncommitted() if path.name not in whole]
        for directory in (self.root, *self.committed()):
            found += (p for p in _entries(directory) if p.name.startswith(files.TEMPORARY))
        return found

    def sweep(self, abandoned: Iterable[Path] | None = None) -> list[Path]:
        """Remove what is abandoned, now or as it was found earlier; returns what was removed."""
        found = self.abandoned() if abandoned is None else list(abandoned)
        gone = [path for path in found if not (is_id(path.name) and _is_checkpoint(path))]
        for path in gone:
            _remove(path)
        return gone


def _facts(
    path: Path, manifest: Manifest | None, parts: Sequence[Part], integrity: Integrity
) -> Facts:
    return Facts(
        id=path.name,
        step=manifest.step if manifest else step_of(path.name) if is_id(path.name) else 0,
        path=str(path),
        created=manifest.created if manifest else 0.0,
        world_size=manifest.world_size if manifest else None,
        model_hash=manifest.model_hash if manifest else None,
        model=next((part.model for part in parts if part.model), None),
        integrity=integrity,
        raw=manifest.raw if manifest else 0,
        stored=manifest.stored if manifest else 0,
        manifest=manifest,
        parts=tuple(parts),
    )


def _untouched(path: Path, part: Part) -> bool:
    """Whether all packs of `part` are what they were when they were verified."""
    for pack in part.packs:
        file = pack_path(path, part, pack)
        with verify.reading(file):
            if verify.fingerprint(file) != pack.fingerprint:
                return False
    return True


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in _entries(path):
            _remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _all_parts(directory: Path) -> list[tuple[Part, bytes]] | None:
    """Every rank's part and its bytes, in order; None while some are missing.

    Raises CorruptCheckpoint when one is damaged or they cannot belong together.
    """
    present = sorted(p.name for p in _entries(directory) if PART_FILE.match(p.name))
    if not present:
        return None
    first = _stored_part(directory / present[0])[0]
    if len(present) < first.world_size:
        # The usual case for all ranks but the last, so it must not cost reading all parts.
        return None
    _expect(directory, "parts", [part_file(r) for r in range(first.world_size)], present)
    found = [_stored_part(directory / name) for name in present]
    for part, _ in found:
        _expect(directory, "id", directory.name, part.id)
        pack = directory / part.pack
        with verify.reading(pack):
            _expect(pack, "bytes", part.stored, pack.stat().st_size)
        for id in part.needs:
            _expect(directory.parent / id / MANIFEST, "there", True, _committed(directory, id))
    return found


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists()


def _committed(directory: Path, id: str) -> bool:
    return (directory.parent / id / MANIFEST).exists()


def _stored_part(file: Path) -> tuple[Part, bytes]:
    with verify.reading(file):
        data = file.read_bytes()
    return Part.decode(data, str(file)), data


def _check_chain(path: Path, manifest: Manifest) -> None:
    """The parent, if it is still there and readable, must be the one that was recorded."""
    if manifest.parent is None:
        return
    file = path.parent / manifest.parent.id / MANIFEST
    try:
        parent = Manifest.decode(file.read_bytes(), str(file))
    except (OSError, CheckpointError):
        # Its own troubles are its own verdict.
        return
    if parent.id == manifest.parent.id:  # else it is not in its place, which is its own trouble too
        _expect(path / MANIFEST, f"parent {parent.id}", manifest.parent.digest, parent.digest)


def _expect(file: Path, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise CorruptCheckpoint(f"{file}: {what}: expected {expected}, found {found}")
