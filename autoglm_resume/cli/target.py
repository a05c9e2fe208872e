"""Which run, or which checkpoint, a person means."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from autoglm_resume import output
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.supervise.base import bounded, run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.run_list import ListedRun

if TYPE_CHECKING:
    from autoglm_resume.checkpoint.store.store import Store
    from autoglm_resume.job.spec import Job

RUNS = "runs"
MOST_NAMED = 10


def run(given: str | None, *, acts: bool = False) -> RunDirectory:
    """A run directory, the run of a job file, or, unnamed, the newest run from here.

    That is one in ./runs, or one that was started from the working directory or below; a command
    that `acts` on a run takes the latter only where no other run lives. Raises UsageError if there
    is none, or one has to be named.
    """
    if given is None:
        return _unnamed(acts=acts)
    path = Path(given)
    if (of := job(given)) is not None:
        found = RunDirectory(Path(of.run_dir))
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
            hint="`autoglm runs` lists all runs that you started",
        )
    raise UsageError(
        f"{given}: expected a run directory (with job.json) or a job file (.yaml)",
        hint="autoglm status DIR lists the runs in a directory",
    )


def job(given: str | None) -> Job | None:
    """That of the job file that is given, if it is one. Raises UsageError."""
    if given is None or not given.endswith((".yaml", ".yml")) or not Path(given).is_file():
        return None
    from autoglm_resume.job.load import load

    return load(given)


def runs_in(given: str | None) -> list[RunDirectory]:
    """The runs in the directory `given`, if it is one of runs and not a run itself."""
    if given is None or RunDirectory(Path(given)).exists or not Path(given).is_dir():
        return []
    return runs(Path(given))


def checkpoints(given: str | None, *, acts: bool = False) -> Path:
    """Where the checkpoints are that `given` means; a path that is no job file means itself."""
    if given is None or given.endswith((".yaml", ".yml")):
        return run(given, acts=acts).path
    return Path(given)


def to_import_into(given: str) -> tuple[Store, RunDirectory | None]:
    """The checkpoints that `given` means, and the run that they are of, or will be.

    A run to come has them where its job says: as the job file that is given, or that lies beside
    the directory of runs; else in the directory that they have without a word. Raises UsageError.
    """
    from autoglm_resume.checkpoint.store.store import Store
    from autoglm_resume.job.load import load
    from autoglm_resume.observe import inspection

    path = Path(given).absolute()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        job = load(given)
        return Store(Path(job.checkpoint.dir)), RunDirectory(Path(job.run_dir))
    try:
        found = inspection.find(Path(given))
        return found.store, found.run
    except UsageError:  # no checkpoint there yet
        if RunDirectory(path).exists:
            raise
    if path.exists() and not path.is_dir():
        raise UsageError(f"{given}: expected a directory or a job file")
    for file in sorted([*path.parent.parent.glob("*.yaml"), *path.parent.parent.glob("*.yml")]):
        with suppress(UsageError):  # it is no job, or has faults of its own
            job = load(file)
            if Path(job.run_dir) == path:
                return Store(Path(job.checkpoint.dir)), RunDirectory(path)
    if path.parent.name == RUNS or runs(path.parent):
        return Store(path / "checkpoints"), RunDirectory(path)
    return Store(path), None


def _unnamed(*, acts: bool) -> RunDirectory:
    here = runs(Path(RUNS))
    paths = {run.path.resolve(): run for run in here}
    listed = run_list.read()
    elsewhere, silent = _present([run for run in listed if run.path not in paths])
    if here:
        starts = {run.path: run.started for run in listed}
        begun = max(starts.get(path, _last_active(run)) for path, run in paths.items())
        if not elsewhere or begun >= elsewhere[0].started:
            return here[0]
    if not elsewhere:
        raise UsageError(
            f"{Path.cwd()}: no run there: none in ./{RUNS}, none that was started from here",
            hint="name a run directory or a job file, or start one with: autoglm run JOB.yaml; "
            "`autoglm runs` lists those started elsewhere",
        )
    others = [*(run.path for run in elsewhere[1:]), *(run.path for run in here)]
    if acts and _any_lives(others):
        raise _ambiguous([elsewhere[0].path, *others])
    newest = elsewhere[0]
    if newest in silent:
        raise AutoglmError(
            f"{newest.path}: no answer within {bounded.PATIENCE:.0f} s; is its file system there?",
            hint="`autoglm runs` lists the others",
        )
    output.say(f"the {'' if acts else 'newest '}run from here: {_near(newest.path)}")
    return RunDirectory(newest.path)


def _present(listed: Sequence[ListedRun]) -> tuple[list[ListedRun], list[ListedRun]]:
    """(those of the working directory that are not gone, those of them that do not answer)."""
    with suppress(FileNotFoundError):  # nothing was started from a directory that is gone
        cwd = Path.cwd()
        listed = [run for run in listed if run.is_of(cwd)]
        there = bounded.ask(_is_there, listed)
        for number, run in enumerate(listed):
            if there.get(number) is False:
                run_list.forget(run)
        present = [run for number, run in enumerate(listed) if there.get(number) is not False]
        return present, [run for number, run in enumerate(listed) if number not in there]
    return [], []


def _any_lives(runs: Sequence[Path]) -> bool:
    """Whether a supervisor has one of them; of one that does not answer it must be supposed."""
    found = bounded.ask(_lives, runs)
    return any(found.get(number, True) for number in range(len(runs)))


def _lives(run: Path) -> bool:
    return RunDirectory(run).holder() is not None


def _is_there(run: ListedRun) -> bool:
    try:
        return RunDirectory(run.path).exists
    except OSError:  # whoever reads it will hear what is wrong
        return True


def _ambiguous(candidates: Sequence[Path]) -> UsageError:
    named = "".join(f"\n  {_near(path)}" for path in candidates[:MOST_NAMED])
    more = len(candidates) - MOST_NAMED
    rest = f"\n  and {more} more, see: autoglm runs" if more > 0 else ""
    return UsageError(
        f"expected the name of a run, because {len(candidates)} are from here, and not only the "
        f"newest may be running:{named}{rest}",
        hint="name the one that is meant",
    )


def _near(path: Path) -> str:
    """As short as it can be typed from here."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


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
