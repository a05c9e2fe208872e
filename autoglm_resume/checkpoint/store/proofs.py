"""What was found out about checkpoints on storage, for as long as it stays true."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from autoglm_resume import files
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.gate import Candidate
from autoglm_resume.checkpoint.store.store import Store

Stats: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


class Proofs:
    """Facts about the good checkpoints of `store`, each kept until a file changes that it needs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[Path, tuple[Stats, Candidate]] = {}

    def facts(self, path: Path) -> Candidate:
        """About the checkpoint in `path`, which is examined unless it is known as it is now."""
        known = self._known.get(path)
        if known is not None and known[0] == self._stats(path, known[1]):
            return known[1]
        facts = replace(examine(self._store, path), parts=())
        if facts.integrity.ok:
            here = {p: v for p, v in self._known.items() if p.exists()}
            self._known = {**here, path: (self._stats(path, facts), facts)}
        return facts

    def forget(self, path: Path) -> Candidate | None:
        """Examine the checkpoint in `path` anew; returns the last good that was known of it."""
        known = self._known.pop(path, None)
        return known[1] if known else None

    def _stats(self, path: Path, facts: Candidate) -> Stats:
        needs = facts.manifest.needs if facts.manifest else ()
        directories = [path, *(self._store.directory(id) for id in needs)]
        return tuple(stat for directory in directories for stat in _stats(directory))


def _stats(path: Path) -> Stats:
    """Of every file, as far as a change of its content shows there.

    A manifest's ctime changes once more when its writer removes the temporary name, while others
    may have reported it already; a pack keeps its ctime from before its part was written.
    """
    if not path.is_dir():
        return ()
    with os.scandir(path) as entries:
        found = [(e.name, e.stat()) for e in entries if not e.name.startswith(files.TEMPORARY)]
    return tuple(
        sorted(
            (
                name,
                s.st_size,
                s.st_mtime_ns,
                s.st_ctime_ns if name.endswith(".pack") else 0,
                s.st_ino,
            )
            for name, s in found
        )
    )
