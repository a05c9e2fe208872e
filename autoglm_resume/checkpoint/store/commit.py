"""What has no manifest: commit it when all parts are there, sweep it when they never will be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import verify
from autoglm_resume.checkpoint.format.document import LARGEST_PART
from autoglm_resume.checkpoint.format.ids import is_id
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest, Parent
from autoglm_resume.checkpoint.format.part import Part, part_file
from autoglm_resume.checkpoint.store.gate import Candidate, Integrity
from autoglm_resume.checkpoint.store.store import (
    Store,
    clear,
    entries,
    expect,
    is_grave,
    strangers,
)
from autoglm_resume.errors import CheckpointError

PART_FILE = re.compile(r"rank-\d{5,}\.json\Z")


def commit(store: Store, id: str) -> Manifest | None:
    """Write the manifest of `id` if all parts are there; None if some are missing.

    Any rank may call it at any time, and so may the supervisor; the first writer wins and all
    get the same manifest. Older checkpoints that only lack theirs are committed first, so the
    chain is not broken by whoever died in between.
    Raises CorruptCheckpoint when the parts are damaged or disagree.
    """
    directory = store.directory(id)
    if (directory / MANIFEST).exists():
        return store.load_manifest(directory)
    found = _all_parts(directory)
    if found is None:
        return None
    lineage = found[0][0].lineage
    for ancestor in reversed(lineage):
        path = store.directory(ancestor)
        with suppress(CheckpointError):
            if path.is_dir() and not (path / MANIFEST).exists() and (old := _all_parts(path)):
                _write_manifest(store, path, old)
    return _write_manifest(store, directory, found)


def complete(store: Store, fits: Callable[[Manifest], bool] = lambda _: True) -> list[Manifest]:
    """Commit every directory whose parts are all there; returns what was committed.

    For the supervisor, before the gate, when no rank is alive. What does not fit the run is
    left as it is.
    """
    done: list[Manifest] = []
    for path in reversed(store.uncommitted()):
        with suppress(CheckpointError):
            found = _all_parts(path)
            if found and fits(_manifest(store, found)) and (manifest := commit(store, path.name)):
                done.append(manifest)
    return done


def whole(store: Store) -> list[Candidate]:
    """The uncommitted directories that lack only their manifest, newest first."""
    whole = []
    for path in store.uncommitted():
        with suppress(CheckpointError):
            if found := _all_parts(path):
                manifest = _manifest(store, found)
                parts = tuple(part for part, _ in found)
                whole.append(Candidate.of(path, manifest, parts, Integrity(True, "fingerprint")))
    return whole


def _manifest(store: Store, found: list[tuple[Part, bytes]]) -> Manifest:
    parts, documents = zip(*found, strict=True)
    # A rank that missed one announced save has another lineage from there on.
    common = [id for id in parts[0].lineage if all(id in part.lineage for part in parts)]
    return Manifest.of(parts, documents, _parent(store, common))


def _write_manifest(store: Store, directory: Path, found: list[tuple[Part, bytes]]) -> Manifest:
    manifest = _manifest(store, found)
    # A rank whose part has its name may not have flushed that yet: without power the manifest could
    # be all that is left.
    files.sync_directory(directory)
    try:
        files.write(directory / MANIFEST, manifest.encode(), replace=False)
    except FileExistsError:
        return store.load_manifest(directory)
    return manifest


def _parent(store: Store, lineage: Iterable[str]) -> Parent | None:
    for ancestor in lineage:
        with suppress(CheckpointError):
            return Parent(ancestor, store.load_manifest(store.directory(ancestor)).digest)
    return None


def abandoned(store: Store) -> list[Path]:
    """Uncommitted directories that lack a part, and temporary files: as far as they are ours.

    Ask when no rank or saver is alive: theirs look the same.
    """
    complete_but_manifest = {candidate.id for candidate in whole(store)}
    unfinished = (path for path in store.uncommitted() if path.name not in complete_but_manifest)
    found = [path for path in unfinished if not strangers(path)]
    for directory in (store.root, *store.committed()):
        temporary = (p for p in entries(directory) if p.name.startswith(files.TEMPORARY))
        found += (p for p in temporary if is_grave(p) or not p.is_dir())
    return found


def sweep(store: Store, found: Iterable[Path] | None = None) -> list[Path]:
    """Remove what is abandoned, now or as it was found earlier; returns what was removed."""
    found = abandoned(store) if found is None else found
    gone = [path for path in found if not (is_id(path.name) and (path / MANIFEST).exists())]
    for path in gone:
        if is_grave(path):
            store.bury(path)
        elif path.is_dir():
            clear(path)
        else:
            path.unlink(missing_ok=True)
    return gone


def _all_parts(directory: Path) -> list[tuple[Part, bytes]] | None:
    """Every rank's part and its bytes, in order; None while some are missing.

    Raises CorruptCheckpoint when one is damaged or they cannot belong together.
    """
    present = sorted(p.name for p in entries(directory) if PART_FILE.match(p.name))
    if not present:
        return None
    first = _stored_part(directory / present[0])[0]
    if len(present) < first.world_size:
        # The usual case for all ranks but the last, so it must not cost reading all parts.
        return None
    expect(directory, "parts", [part_file(r) for r in range(first.world_size)], present)
    found = [_stored_part(directory / name) for name in present]
    for part, _ in found:
        expect(directory, "id", directory.name, part.id)
        pack = directory / part.pack
        with verify.reading(pack):
            expect(pack, "bytes", part.stored, pack.stat().st_size)
        for id in part.needs:
            expect(directory.parent / id / MANIFEST, "there", True, _committed(directory, id))
    return found


def _committed(directory: Path, id: str) -> bool:
    return (directory.parent / id / MANIFEST).exists()


def _stored_part(file: Path) -> tuple[Part, bytes]:
    with verify.reading(file):
        data = files.read(file, LARGEST_PART)
    return Part.decode(data, str(file)), data
