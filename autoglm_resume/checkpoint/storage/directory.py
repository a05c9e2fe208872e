"""Storage in a directory, local or on a network."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from autoglm_resume import files

PIECE_BYTES = 8 << 20
"""Of what is in memory at once."""


class Directory:
    """A directory that exists already, because one that does not may be a mount that is missing."""

    def __init__(self, root: Path, run: str = "") -> None:
        self._mount = root
        self._root = root / run

    def __str__(self) -> str:
        return str(self._root)

    def _require(self) -> None:
        if not self._mount.is_dir():
            text = "expected a directory (make it, or mount it), found none"
            raise FileNotFoundError(errno.ENOENT, text, str(self._mount))

    def names(self, prefix: str = "") -> dict[str, int]:
        self._require()
        found = {}
        for directory, below, names in os.walk(self._root / prefix, onerror=_unless_missing):
            below[:] = [name for name in below if not name.startswith(files.TEMPORARY)]
            for name in names:
                if not name.startswith(files.TEMPORARY):
                    path = Path(directory, name)
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return found

    def put(self, name: str, path: Path) -> int:
        self._require()
        target = self._root / name
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            files.sync_directory(self._root)
            files.sync_directory(self._mount)
        for leftover in target.parent.glob(f"{files.TEMPORARY}*-{target.name}"):
            leftover.unlink()
        with path.open("rb") as source, files.writing(target) as output:
            shutil.copyfileobj(source, output, PIECE_BYTES)
            return output.tell()

    def get(self, name: str, path: Path) -> None:
        with files.reading(self._root / name) as source, files.writing(path) as output:
            shutil.copyfileobj(source, output, PIECE_BYTES)

    def remove(self, id: str) -> None:
        (self._root / id).rename(self._root / f"{files.TEMPORARY}{os.urandom(4).hex()}-{id}")
        files.sync_directory(self._root)
        for grave in self._root.glob(f"{files.TEMPORARY}*"):
            shutil.rmtree(grave)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
