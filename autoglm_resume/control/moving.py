"""Moving a run's directory, while nobody trains: renamed, never copied."""

from __future__ import annotations

import errno
import os
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.protocol.relocation import relocated
from autoglm_resume.supervise.base import home, run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory


def move(run: RunDirectory, to: Path) -> Path:
    """Move the run to `to`, or into it where that is a directory and no run; returns where it is.

    What it records of itself, and the list of runs, say so then. Raises RunLocked while anybody
    trains there, and AutoglmError for what cannot be moved so, having changed nothing.
    """
    before = run.path
    to = to.absolute()
    if to.is_dir() and not RunDirectory(to).exists:
        to = to / before.name
    _require_movable(before, to)
    checkpoints = home.checkpoints(run)
    with ExitStack() as held:
        held.enter_context(run.locked())
        if checkpoints.is_dir():  # where they lie elsewhere, they say whose they are
            held.enter_context(locked_checkpoints(checkpoints, to))
        real = before.resolve()
        try:
            before.rename(to)
        except OSError as error:
            raise _refused(before, to, error) from error
        files.sync_directory(to.parent)
        if before.parent != to.parent:
            files.sync_directory(before.parent)
        moved = RunDirectory(to)
        with suppress(UsageError):  # of another version, or damaged: it is found moved nonetheless
            job = relocated(moved.recorded_job(), to)
            if job.get("name") == before.name:
                job["name"] = to.name
            moved.save_job({**job, "run_dir": str(to)})
        run_list.moved(real, to)
    return to


def _require_movable(before: Path, to: Path) -> None:
    """Raise UsageError unless the run can be renamed so, and all in it is found then."""
    if os.path.lexists(to):
        raise UsageError(f"{to}: expected no such file or directory, found one")
    if not to.parent.is_dir():
        raise UsageError(f"{to.parent}: no such directory", hint="make it first")
    if to.is_relative_to(before):
        raise UsageError(f"{to}: it lies in the run itself")
    if before.is_symlink():
        raise UsageError(
            f"{before}: it is a link to the run in {before.resolve()}",
            hint="name that; the link is yours to change",
        )
    for link in before.iterdir():
        if link.is_symlink() and not link.readlink().is_absolute():
            raise UsageError(
                f"{link}: it is a link to {link.readlink()}, which it would miss elsewhere",
                hint="have it name the whole path: "
                + shlex.join(["ln", "-sfn", str(link.resolve()), str(link)]),
            )


def _refused(before: Path, to: Path, error: OSError) -> AutoglmError:
    if error.errno == errno.EXDEV:
        return UsageError(
            f"{to}: on another file system than {before}",
            hint="copy it while it does not train, and go on there once the original is gone: "
            + shlex.join(["cp", "-a", str(before), str(to)]),
        )
    return AutoglmError(f"{before}: could not be moved to {to}: {error.strerror}")
