"""Where a run is at home: a directory that was moved is the run, and one that was copied is not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from autoglm_resume import output
from autoglm_resume.errors import UsageError
from autoglm_resume.events import RunStarted
from autoglm_resume.protocol.relocation import home_of, same
from autoglm_resume.supervise.base.run_directory import RunDirectory, last_run


def checkpoints(run: RunDirectory) -> Path:
    """The directory of the run's checkpoints.

    Raises UsageError where they lie elsewhere and are another run's, or those of the run that this
    one was copied from.
    """
    found = _recorded(run)
    before = _elsewhere(run)
    if before is None or found.is_relative_to(run.path) or not RunDirectory(before).exists:
        return found
    if same(_recorded(RunDirectory(before)), found):
        raise UsageError(
            f"{run.path}: it holds no checkpoints, and {found}, where its job has them, is used by"
            f" the run in {before}",
            hint=f"name what is meant: {before}, or a directory of checkpoints",
        )
    return found


def require_own(run: RunDirectory, checkpoints: Path) -> None:
    """Raise UsageError where `checkpoints` are those of another run that is still there.

    For a run that is about to begin: it would go on from what another job has made, or be finished
    before it has trained.
    """
    for directory in (*checkpoints.parents, last_run(checkpoints)):
        if directory is None or same(directory, run.path):
            continue
        other = RunDirectory(directory)
        with suppress(UsageError, PermissionError):  # anybody may have a job.json of their own
            if other.exists and _id(other) and same(_recorded(other), checkpoints):
                break
    else:
        return
    raise UsageError(
        f"{checkpoints}: expected checkpoints of {run.path}, or none, found those of the run in"
        f" {directory}",
        hint="give each job a checkpoint.dir of its own; or go on with that run: "
        f"{output.command('resume', directory)}; or, to go on from there as another run, move that"
        " directory away",
    )


def left(run: RunDirectory) -> Path | None:
    """Where the run was before it was moved here; None if it was not.

    Raises UsageError if it is a copy: the original, which is still there, would go on too, in the
    same replicas.
    """
    home = _elsewhere(run)
    if home is None:
        return None
    if (own := _id(run)) and _id(RunDirectory(home)) == own:
        raise UsageError(
            f"{run.path}: this is a copy of the run in {home}, which is still there",
            hint=f"continue that one: {output.command('resume', home)}; or move it away first",
        )
    checkpoints(run)
    return home


def _recorded(run: RunDirectory) -> Path:
    where = run.section("checkpoint").get("dir")
    return Path(where) if where and isinstance(where, str) else run.path / "checkpoints"


def _elsewhere(run: RunDirectory) -> Path | None:
    try:
        home = home_of(run.recorded_job())
    except PermissionError:  # another user's: only for what is shown of it
        return None
    return None if home is None or same(home, run.path) else home


def _id(run: RunDirectory) -> str | None:
    return next((e.run_id for e in run.events() if isinstance(e, RunStarted)), None)
