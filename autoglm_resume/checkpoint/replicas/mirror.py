"""Bringing a replica up to date with a store: what `plan` says, done."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.part import pack_file
from autoglm_resume.checkpoint.replicas.plan import CommittedFiles, branch_file, in_order, uploads
from autoglm_resume.checkpoint.storage.storage import Storage
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint


def committed(store: Store, known: Mapping[str, CommittedFiles]) -> dict[str, CommittedFiles]:
    """Every committed checkpoint here with a readable manifest; what is `known` is not read again.

    Raises OSError.
    """
    found = {}
    for path in store.committed():
        with suppress(CheckpointError, FileNotFoundError):  # deleted just now
            found[path.name] = known.get(path.name) or _copy(store, path)
    return found


def _copy(store: Store, path: Path) -> CommittedFiles:
    manifest = store.load_manifest(path)
    names = [MANIFEST]
    for part in manifest.parts:
        names += [part.file, pack_file(part.rank)]
    return CommittedFiles({name: (path / name).stat().st_size for name in names}, manifest.needs)


def tell_branches(branches: Collection[Branch], names: Collection[str], storage: Storage) -> None:
    """Have `storage`, which has files of these `names`, say where the run left what behind.

    Raises OSError.
    """
    for branch in branches:
        if (name := branch_file(branch)) not in names:
            with tempfile.NamedTemporaryFile() as file:
                file.write(json.dumps(branch._asdict()).encode() + b"\n")
                file.flush()
                storage.put(name, Path(file.name))


def replicate(
    store: Store,
    id: str,
    here: Mapping[str, CommittedFiles],
    there: MutableMapping[str, dict[str, int]],
    storage: Storage,
) -> int:
    """Complete `id`, and first what it needs, in `storage`; returns the bytes that were sent.

    `there` is what the storage holds, and is kept up to date; a manifest is sent when all other
    files of its checkpoint are listed with their sizes.
    Raises OSError, after which the next call goes on (FileNotFoundError where the checkpoint was
    deleted in the meantime); CorruptCheckpoint if a copy would be bad.
    """
    todo = uploads(id, here, there)
    for each in dict.fromkeys(each for each, _ in todo):
        path = store.directory(each)
        candidate = examine(store, path)
        if not candidate.integrity.ok:
            if not path.exists():  # retired while it was looked at, which is no damage
                raise FileNotFoundError(errno.ENOENT, "deleted in the meantime", str(path))
            raise CorruptCheckpoint(f"{each}: not replicated: {candidate.integrity.problem}")
    sent = 0
    for each, file in todo:
        if file == MANIFEST:
            _require_all(each, here[each], storage)
        sent += storage.put(f"{each}/{file}", store.directory(each) / file)
        there.setdefault(each, {})[file] = here[each].files[file]
    return sent


def _require_all(id: str, copy: CommittedFiles, storage: Storage) -> None:
    found = storage.names(id)
    for file in in_order(copy.files)[:-1]:
        expected, size = copy.files[file], found.get(f"{id}/{file}")
        if size != expected:
            raise OSError(f"{id}/{file}: expected {expected} bytes in the replica, found {size}")
