"""The runs that this user has started, wherever they lie, so that nobody has to remember where.

    $XDG_STATE_HOME/autoglm/runs/DIGEST.json        one per run directory, by that of its path

Only a help to find them: what a run is stands in its own directory. So no start fails, or waits
for long, because of what is wrong here; and two at once write two files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.supervise.base import bounded

LARGEST = 1 << 16
"""Bytes of one file: two paths, a name and a time."""
STALE = 3600.0
"""Seconds after which what a write left behind that was killed is swept away."""


@dataclass(frozen=True)
class ListedRun:
    """One run of the list."""

    path: Path
    """Of its directory, without symbolic links."""
    name: str
    started_from: Path
    """The directory that its last supervisor was started in."""
    started: float
    """Unix seconds, of that start."""

    def is_of(self, directory: Path) -> bool:
        """Whether it was started from `directory` or below, or lies there."""
        return any(path.is_relative_to(directory) for path in (self.started_from, self.path))


def directory() -> Path | None:
    """Where the list is, None where this user has no place for it."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # the rule of the XDG specification
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError:
            return None
    return state / "autoglm" / "runs" if state.is_absolute() else None


def add(run: Path, name: str) -> None:
    """Put the run in `run` on the list, as started now from the working directory."""
    where = directory()
    if where is None:
        return
    with suppress(OSError):
        found = {
            "path": str(run.resolve()),
            "name": name,
            "started_from": str(Path.cwd()),
            "started": time.time(),
        }
        # A home on a file server that is gone must not hold up a run that does not need it.
        bounded.ask(lambda path: _write(path, found), [_file(where, run.resolve())])


def moved(before: Path, to: Path) -> None:
    """The run that was in `before` is in `to` now; both without symbolic links before that."""
    for run in read():
        if run.path == before and (where := directory()) is not None:
            found = {
                "path": str(to.resolve()),
                "name": to.name if run.name == before.name else run.name,
                "started_from": str(run.started_from),
                "started": run.started,
            }
            with suppress(OSError):
                _write(_file(where, to.resolve()), found)
            forget(run)


def read() -> list[ListedRun]:
    """The list, the last started first. What is damaged is left out."""
    where = directory()
    found: list[ListedRun] = []
    if where is not None:
        with suppress(OSError):
            found = [run for file in where.iterdir() if (run := _read(file))]
    return sorted(found, key=lambda run: run.started, reverse=True)


def forget(run: ListedRun) -> None:
    """Take a run whose directory is gone off the list, unless it was started again meanwhile."""
    where = directory()
    if where is not None:
        file = _file(where, run.path)
        with suppress(OSError):
            if _read(file) == run:
                file.unlink()


def _file(where: Path, run: Path) -> Path:
    digest = hashlib.blake2b(os.fsencode(run), digest_size=16).hexdigest()
    return where / f"{digest}.json"


def _write(file: Path, found: dict[str, object]) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write(file, json.dumps(found).encode() + b"\n", durable=False)
    for left in file.parent.glob(f"{files.TEMPORARY}*"):
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - STALE:
                left.unlink()


def _read(file: Path) -> ListedRun | None:
    if file.suffix != ".json" or file.name.startswith(files.TEMPORARY):
        return None
    try:
        found = json.loads(files.read(file, LARGEST))
        path, origin = Path(found["path"]), Path(found["started_from"])
        listed = ListedRun(path, str(found["name"]), origin, float(found["started"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    sound = path.is_absolute() and "\0" not in str(path) and listed.started == listed.started
    return listed if sound else None
