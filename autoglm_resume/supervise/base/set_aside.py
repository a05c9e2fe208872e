"""Setting an earlier run aside, so that one can start over: renamed, never copied or deleted.

A directory that holds checkpoints only because a job says so may be anything: a mounted volume, a
link to a larger disk, the project itself. So it stays, and only what is ours in it is moved, to a
directory within. The run's own directory is renamed as a whole, for all in it is the run's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks.reader import QUARANTINE
from autoglm_resume.checkpoint.format.ids import is_id, newest_first
from autoglm_resume.checkpoint.store.store import entries
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.supervise.base.run_directory import RunDirectory

ASIDE = "set-aside"
"""Of checkpoints that lie outside of the run's directory, in theirs; a number follows."""


def start_over(run: RunDirectory, checkpoints: Path, needed: Iterable[Path]) -> list[str]:
    """Set the earlier run aside, if there is one and nobody has it; returns what was put where.

    `needed` are files and directories that the next run needs where they are. Raises RunLocked, and
    UsageError for a directory that cannot be renamed, having changed nothing.
    """
    home = run.path.resolve()
    exists = run.exists or run.journal.exists()
    within = checkpoints.is_relative_to(run.path)
    if exists:
        _require_movable(home, needed)
        if within and checkpoints.exists() and not _plainly_in(checkpoints, home):
            raise UsageError(
                f"{checkpoints}: it is a link or a mount point in the run's directory, which"
                " --fresh would set aside with it",
                hint="name the place that it leads to as checkpoint.dir, or move what is in it",
            )
    said, moved = [], None
    if not within and (ours := _ours(checkpoints)):
        with locked_checkpoints(checkpoints):
            moved = _free(checkpoints / ASIDE)
            _rename(ours, moved)
        said.append(f"{checkpoints}: the checkpoints that were there are now in {moved}")
    if exists:
        with run.locked():
            aside = _free(home)
            if moved is not None:  # before the rename: a crash leaves a run that says the truth
                with suppress(UsageError):
                    job = run.recorded_job()
                    how = {**(job.get("checkpoint") or {}), "dir": str(moved)}
                    run.save_job({**job, "checkpoint": how})
            _renamed(home, aside)
        if run.path.is_symlink():
            home.mkdir()  # the next run's files go where the link leads, as this one's did
        said.append(f"{run.path}: the earlier run is now in {aside}")
    return said


def _ours(checkpoints: Path) -> list[Path]:
    """The checkpoints and what belongs to them: the oldest first.

    If a crash leaves half of them, those that are left lack what they need, or are whole.
    """
    found = {path.name: path for path in entries(checkpoints)}
    ids = [name for name in found if is_id(name) and found[name].is_dir()]
    own = [name for name in found if name == QUARANTINE or name.startswith(files.TEMPORARY)]
    return [found[name] for name in (*reversed(newest_first(ids)), *own)]


def _rename(ours: Sequence[Path], aside: Path) -> None:
    aside.mkdir()
    for path in ours:
        _renamed(path, aside / path.name)
    files.sync_directory(aside)
    files.sync_directory(aside.parent)


def _renamed(path: Path, aside: Path) -> None:
    try:
        path.rename(aside)
    except OSError as error:
        raise AutoglmError(
            f"{path}: could not be set aside as {aside}: {error.strerror}",
            hint="move it away by hand",
        ) from error


def _free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}~{number}") for number in itertools.count(1))
    return next(each for each in numbered if not os.path.lexists(each))


def _require_movable(home: Path, needed: Iterable[Path]) -> None:
    here = [path for path in needed if path.resolve().is_relative_to(home)]
    reason = ""
    if here:
        reason = f"it is also where {here[0]} lies"
    elif os.path.ismount(home) or str(home) in _mount_points():
        reason = "it is a mount point"
    if reason:
        raise UsageError(
            f"{home}: --fresh would set this run directory aside, and {reason}",
            hint="give the run a directory of its own (run_dir), or move what is in it away",
        )


def _plainly_in(checkpoints: Path, home: Path) -> bool:
    resolved = checkpoints.resolve()
    mounted = str(resolved) in _mount_points() or os.path.ismount(resolved)
    return resolved.is_relative_to(home) and not mounted


def _mount_points() -> frozenset[str]:
    """Those of this process; a directory that is bound to another is one, too."""
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        return frozenset(line.split()[4].encode().decode("unicode_escape") for line in lines)
    return frozenset()
