"""What is found out about a committed checkpoint: everything that the gate wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.chunks.reader import ChunkReader, pack_path
from autoglm_resume.checkpoint.chunks.verify import Progress
from autoglm_resume.checkpoint.format.document import LARGEST_MANIFEST
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest, needs_of
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.store.gate import Candidate, Integrity
from autoglm_resume.checkpoint.store.store import Store, expect
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint


def examine(
    store: Store, path: Path, *, deep: bool = False, progress: Progress | None = None
) -> Candidate:
    """Everything the gate wants to know; what is wrong is in `integrity`, never raised.

    A pack whose stat fingerprint is what the saver recorded after reading it back is trusted;
    otherwise, or with `deep`, every chunk is read and checked. `progress` gets bytes done.
    """
    manifest: Manifest | None = None
    parts: list[Part] = []
    how: Literal["fingerprint", "content"] = "fingerprint"
    problem, unreadable = "", False
    try:
        manifest = store.load_manifest(path)
        expect(path / MANIFEST, "id", path.name, manifest.id)
        _check_chain(path, manifest)
        if gone := lacking(store, manifest):
            raise CorruptCheckpoint(
                f"{path}: it shares packs of {', '.join(gone)}, not there any more: put back what"
                " was deleted, from a copy or a replica (checkpoint.replicas repairs it)"
            )
        for ref in manifest.parts:
            parts.append(store.part(path, manifest, ref))
        for part in parts:
            if deep or not _untouched(path, part):
                how = "content"
                with ChunkReader(path, parts) as reader:
                    verify.on_one_part(part, reader.read, progress)
        expect(path / MANIFEST, "needs", manifest.needs, needs_of(parts))
    except CheckpointError as error:
        problem, unreadable = error.message, not isinstance(error, CorruptCheckpoint)
    return Candidate.of(path, manifest, parts, Integrity(not problem, how, problem, unreadable))


def lacking(store: Store, manifest: Manifest) -> list[str]:
    """Ids of the checkpoints that it needs and that are gone, each as a whole."""
    return [id for id in manifest.needs if not store.directory(id).is_dir()]


def candidates(
    store: Store, *, deep: bool = False, progress: Progress | None = None
) -> Iterator[Candidate]:
    """The committed checkpoints, newest first, each examined when asked for."""
    for path in store.committed():
        yield examine(store, path, deep=deep, progress=progress)


def _untouched(path: Path, part: Part) -> bool:
    """Whether all packs of `part` are what they were when they were verified."""
    for pack in part.packs:
        file = pack_path(path, part, pack)
        with verify.reading(file):
            if verify.fingerprint(file) != pack.fingerprint:
                return False
    return True


def _check_chain(path: Path, manifest: Manifest) -> None:
    """The parent, if it is still there and readable, must be the one that was recorded."""
    if manifest.parent is None:
        return
    file = path.parent / manifest.parent.id / MANIFEST
    try:
        parent = Manifest.decode(files.read(file, LARGEST_MANIFEST), str(file))
    except (OSError, CheckpointError):
        # Its own troubles are its own verdict.
        return
    if parent.id == manifest.parent.id:  # else it is not in its place, which is its own trouble too
        expect(path / MANIFEST, f"parent {parent.id}", manifest.parent.digest, parent.digest)
