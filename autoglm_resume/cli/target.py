"""Which run, which runs, or which checkpoint a person means."""

from __future__ import annotations

import shlex
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
    """A run directory, the run of a job file or of a name, or, unnamed, the newest run from here.

    That is one in ./runs, or one that was started from the working directory or below; a command
    that `acts` on a run takes it only where no other of them lives. Raises UsageError if there is
    none, or one has to be named.
    """
    if given is None:
        candidates = from_here()
        if acts and any(lives(candidates[1:])):
            raise ambiguous(candidates, "and not only the newest is running")
        return _first(candidates)
    path = Path(given)
    if (of := _job_of(path)) is not None:
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
    if (named := _named(given)) is not None:
        return named
    if not path.exists():
        raise UsageError(
            f"{given}: no such run, run directory or job file",
            hint="`autoglm runs` lists all runs that you started",
        )
    raise UsageError(
        f"{given}: expected a run directory (with job.json) or a job file (.yaml)",
        hint="autoglm status DIR lists the runs in a directory",
    )


def job(given: str | None) -> Job | None:
    """That of the job file that is given, if it is one. Raises UsageError.

    A script says where its run is, and not with which arguments.
    """
    return None if given is None or given.endswith(".py") else _job_of(Path(given))


def _job_of(path: Path) -> Job | None:
    if path.suffix not in (".yaml", ".yml", ".py") or not path.is_file():
        return None
    from autoglm_resume.job.load import load

    return load(path)


def runs_in(given: str | None) -> list[RunDirectory]:
    """The runs in the directory `given`, if it is one of runs and not a run itself."""
    if given is None or RunDirectory(Path(given)).exists or not Path(given).is_dir():
        return []
    return runs(Path(given))


def checkpoints(given: str | None, *, acts: bool = False) -> Path:
    """Where the checkpoints are that `given` means; a path that is no job file means itself."""
    if given is None or given.endswith((".yaml", ".yml")):
        return run(given, acts=acts).path
    named = None if Path(given).exists() else _named(given)
    return named.path if named is not None else Path(given)


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


def from_here() -> list[RunDirectory]:
    """The runs in ./runs and those that were started from here or lie here, the newest first.

    Raises UsageError if there is none.
    """
    here = runs(Path(RUNS))
    paths = {run.path.resolve(): run for run in here}
    listed = run_list.read()
    elsewhere = _present([run for run in listed if run.path not in paths])
    if not here and not elsewhere:
        raise UsageError(
            f"{Path.cwd()}: no run there: none in ./{RUNS}, none that was started from here",
            hint="name a run directory or a job file, or start one with: autoglm run JOB.yaml; "
            "`autoglm runs` lists those started elsewhere",
        )
    starts = {run.path: run.started for run in listed}
    begun = max((starts.get(path, _last_active(run)) for path, run in paths.items()), default=0.0)
    others = [RunDirectory(run.path) for run in elsewhere]
    in_front = bool(elsewhere) and (not here or elsewhere[0].started > begun)
    return [*others, *here] if in_front else [*here, *others]


def _first(found: Sequence[RunDirectory]) -> RunDirectory:
    """The newest of those from here, saying which it is where that is not plain to see."""
    newest = found[0]
    if newest.path.parent != Path(RUNS).absolute():
        if 0 not in bounded.ask(_is_there, [newest]):
            raise AutoglmError(
                f"{newest.path}: no answer within {bounded.PATIENCE:.0f} s; is its file system "
                "there?",
                hint="`autoglm runs` lists the others",
            )
        output.say(f"the newest run from here: {output.near(newest.path)}")
    return newest


def _named(name: str) -> RunDirectory | None:
    """The run that is called so in ./runs or by `autoglm runs`, those from here first.

    None if there is none. Raises UsageError if there are several.
    """
    if "/" in name:
        return None
    here = RunDirectory(Path(RUNS, name).absolute())
    if here.exists:
        return here
    listed = [run for run in run_list.read() if run.name == name]
    there = bounded.ask(_is_there, [RunDirectory(run.path) for run in listed])
    called = [run for number, run in enumerate(listed) if there.get(number, True)]
    near = [run for run in called if run.is_of(Path.cwd())] or called
    if len(near) > 1:
        raise ambiguous([RunDirectory(run.path) for run in near], f"all of them are called {name}")
    return RunDirectory(near[0].path) if near else None


def _present(listed: Sequence[ListedRun]) -> list[ListedRun]:
    """Those of the working directory that are not gone, also where they do not answer."""
    with suppress(FileNotFoundError):  # nothing was started from a directory that is gone
        cwd = Path.cwd()
        listed = [run for run in listed if run.is_of(cwd)]
        there = bounded.ask(_is_there, [RunDirectory(run.path) for run in listed])
        for number, run in enumerate(listed):
            if there.get(number) is False:
                run_list.forget(run)
        return [run for number, run in enumerate(listed) if there.get(number) is not False]
    return []


def lives(runs: Sequence[RunDirectory]) -> list[bool]:
    """Whether a supervisor has each; of one that does not answer it must be supposed."""
    found = bounded.ask(lambda run: run.holder() is not None, runs)
    return [found.get(number, True) for number in range(len(runs))]


def ambiguous(candidates: Sequence[RunDirectory], why: str) -> UsageError:
    """To be raised where a person has to say which of `candidates` is meant."""
    named = "".join(f"\n  {shown(run)}" for run in candidates[:MOST_NAMED])
    more = len(candidates) - MOST_NAMED
    rest = f"\n  and {more} more, see: autoglm runs" if more > 0 else ""
    return UsageError(
        f"expected the name of a run, because there are {len(candidates)}, {why}:{named}{rest}",
        hint="name the one that is meant",
    )


def shown(run: RunDirectory) -> str:
    """Its directory, to be pasted into a shell here."""
    return shlex.quote(str(output.near(run.path)))


def _is_there(run: RunDirectory) -> bool:
    try:
        return run.exists
    except OSError:  # whoever reads it will hear what is wrong
        return True


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
