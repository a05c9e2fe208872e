"""The directory of checkpoints: what is in it, read, quarantined, deleted.

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
from contextlib import suppress
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import QUARANTINE
from autoglm_resume.checkpoint.format.document import (
    LARGEST_MANIFEST,
    LARGEST_PART,
    digest,
    indented,
)
from autoglm_resume.checkpoint.format.ids import attempt_of, is_id, recency, step_of
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest, PartRef
from autoglm_resume.checkpoint.format.part import Part, is_own
from autoglm_resume.errors import CorruptCheckpoint, WorldSizeMismatch

REASON = "reason.json"
_GRAVE = re.compile(rf"^{re.escape(files.TEMPORARY)}(?:[0-9a-f]{{8}}-)?")


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
        found = [path for path in entries(self.root) if is_id(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: recency(path.name), reverse=True)

    # Read

    def load_manifest(self, path: Path) -> Manifest:
        """Of the checkpoint in `path`, verified against its own digest.

        Raises CheckpointError.
        """
        file = path / MANIFEST
        with verify.reading(file):
            data = files.read(file, LARGEST_MANIFEST)
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
        return self.part(path, manifest, manifest.parts[rank])

    def parts_for(self, path: Path, part: Part) -> list[Part]:
        """The parts that reading `part` takes: all of them where ranks share chunks.

        Raises CheckpointError.
        """
        if not any(chunk.with_peer for chunk in part.chunks):
            return [part]
        manifest = self.load_manifest(path)
        return [
            part if ref.rank == part.rank else self.part(path, manifest, ref)
            for ref in manifest.parts
        ]

    def part(self, path: Path, manifest: Manifest, ref: PartRef) -> Part:
        """What `ref` in the `manifest` of the checkpoint in `path` is. Raises CheckpointError."""
        file = path / ref.file
        with verify.reading(file):
            data = files.read(file, LARGEST_PART)
        if (found := digest(data)) != ref.digest:
            raise CorruptCheckpoint(f"{file}: expected {ref.digest}, found {found}")
        part = Part.decode(data, str(file))
        expect(file, "id", manifest.id, part.id)
        expect(file, "rank", ref.rank, part.rank)
        expect(file, "world size", manifest.world_size, part.world_size)
        expect(file, "raw bytes", ref.raw, part.raw)
        expect(file, "stored bytes", ref.stored, part.stored)
        expect(file, "shared bytes", ref.shared, part.shared)
        expect(file, "objects", ref.objects, part.objects)
        return part

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
        return sorted(path for path in entries(self.root / QUARANTINE) if path.is_dir())

    def delete(self, id: str) -> None:
        """Remove checkpoint `id`, committed or not; what others have put there stays there.

        It vanishes by one rename. Unlinking the manifest alone would leave parts that the next
        `complete` commits again, perhaps without a parent that is deleted by then: another
        manifest than the one whose digest the next checkpoint of the chain has recorded.
        """
        grave = self.root / f"{files.TEMPORARY}{id}"
        if grave.exists():
            self.bury(grave)
        self.directory(id).rename(grave)
        files.sync_directory(self.root)
        self.bury(grave)

    def bury(self, grave: Path) -> None:
        """Remove what `is_grave`, and put back what others had put into that checkpoint."""
        clear(grave)
        home = self.root / _GRAVE.sub("", grave.name)
        if grave.exists() and not home.exists():
            grave.rename(home)


def entries(directory: Path) -> list[Path]:
    """What is in it; nothing where it is not there."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def strangers(directory: Path) -> list[Path]:
    """What is in a directory named like a checkpoint and is no file of the format."""
    if directory.is_symlink():  # whose, leading where?
        return [directory]
    return [entry for entry in entries(directory) if not _is_ours(entry)]


def is_grave(path: Path) -> bool:
    """Whether it is a checkpoint that was being deleted, or fetched from a replica."""
    return is_id(_GRAVE.sub("", path.name)) and not is_id(path.name) and path.is_dir()


def clear(directory: Path) -> None:
    """Remove every file of the format in it, and the directory itself if nothing else is there."""
    for entry in entries(directory):
        if _is_ours(entry):
            entry.unlink(missing_ok=True)
    if not entries(directory):
        directory.rmdir()


def _is_ours(entry: Path) -> bool:
    named = is_own(entry.name) or entry.name.startswith(files.TEMPORARY)
    return named and not entry.is_dir()


def expect(file: Path, what: str, expected: object, found: object) -> None:
    """Raise CorruptCheckpoint naming `file` and `what` unless they are equal."""
    if expected != found:
        raise CorruptCheckpoint(f"{file}: {what}: expected {expected}, found {found}")
