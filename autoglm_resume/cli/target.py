"""Which run, or which checkpoint, a person means."""

from __future__ import annotations

from pathlib import Path

from autoglm_resume.errors import UsageError
from autoglm_resume.supervise.base.run_directory import RunDirectory

RUNS = "runs"


def run(given: str | None) -> RunDirectory:
    """A run directory, the run of a job file, or the newest run under ./runs.

    Raises UsageError if there is none.
    """
    if given is None:
        return newest(Path(RUNS))
    path = Path(given)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        from autoglm_resume.job.load import load

        found = RunDirectory(Path(load(path).run_dir))
        if not found.exists:
            raise UsageError(
                f"{given}: this job was never started ({found.path} holds no run)",
                hint=f"start it with: autoglm run {given}",
            )
        return found
    found = RunDirectory(path.absolute())
    if found.exists:
        return found
    if not path.exists():
        raise UsageError(
            f"{given}: no such run directory or job file",
            hint="`autoglm status runs` lists the runs in ./runs",
        )
    raise UsageError(
        f"{given}: expected a run directory (with job.json) or a job file (.yaml)",
        hint="autoglm status DIR lists the runs in a directory",
    )


def runs_in(given: str | None) -> list[RunDirectory]:
    """The runs in the directory `given`, if it is one of runs and not a run itself."""
    if given is None or RunDirectory(Path(given)).exists or not Path(given).is_dir():
        return []
    return runs(Path(given))


def checkpoints(given: str | None) -> Path:
    """Where the checkpoints are that `given` means; a path that is no job file means itself."""
    if given is None or given.endswith((".yaml", ".yml")):
        return run(given).path
    return Path(given)


def newest(directory: Path) -> RunDirectory:
    """The run in `directory` whose journal changed last. Raises UsageError if there is none."""
    found = runs(directory)
    if not found:
        raise UsageError(
            f"{directory.absolute()}: no run there",
            hint="name a run directory or a job file, or start one with: autoglm run JOB.yaml",
        )
    return found[0]


def runs(directory: Path) -> list[RunDirectory]:
    """The runs in `directory`, most recently active first."""
    try:
        entries = [RunDirectory(path.absolute()) for path in directory.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UsageError(f"{directory}: expected a directory of runs") from None
    return sorted((run for run in entries if run.exists), key=_last_active, reverse=True)


def _last_active(run: RunDirectory) -> float:
    for path in (run.journal, run.path):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
