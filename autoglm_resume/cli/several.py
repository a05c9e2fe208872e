"""Which runs a command acts on that may act on several, and doing it to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from autoglm_resume import output
from autoglm_resume.cli import target
from autoglm_resume.cli.guard import tried
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.observe.pure.say import plural
from autoglm_resume.supervise.base.run_directory import RunDirectory

T = TypeVar("T")


def living(given: Sequence[str], command: str, *, sure: bool) -> list[RunDirectory]:
    """Those to `stop` or `save`: what was named, else the only run from here that lives.

    A directory of runs means those in it that live, none if none does. Raises UsageError.
    """
    if given:
        return _named(given, command, sure=sure)
    found = target.from_here()
    alive = _living(found)
    if len(alive) > 1:
        raise target.ambiguous(alive, "all of them running")
    return alive or [target.run(None)]


def _named(given: Sequence[str], command: str, *, sure: bool) -> list[RunDirectory]:
    found: dict[Path, RunDirectory] = {}
    from_directories = False
    for each in given:
        inside = target.runs_in(each)
        alive = _living(inside)
        if inside and not alive:
            output.say(f"{each}: none of its {plural(len(inside), 'run')} is running")
        from_directories = from_directories or bool(alive)
        for run in alive if inside else [target.run(each)]:
            found.setdefault(run.path.resolve(), run)
    runs = list(found.values())
    if from_directories and not sure:
        agree(runs, command, given)
    return runs


def checkpoints(given: Sequence[str], command: str, *, sure: bool) -> list[Path]:
    """Where the checkpoints are that are meant: of a directory of runs those of all in it.

    Unnamed, of the newest run from here, if no other lives. Raises UsageError.
    """
    if not given:
        return [target.checkpoints(None, acts=True)]
    inside = {each: target.runs_in(each) for each in given}
    runs = [run for found in inside.values() for run in found]
    if runs and not sure:
        agree(runs, command, given)
    found = [
        path
        for each, those in inside.items()
        for path in ([run.path for run in those] or [target.checkpoints(each)])
    ]
    return list({path.resolve(): path for path in found}.values())


def _living(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    return [run for run, lives in zip(runs, target.lives(runs), strict=True) if lives]


def agree(runs: Sequence[RunDirectory], command: str, given: Sequence[str]) -> None:
    """Ask whether these runs are meant, which nobody named one by one.

    Raises AutoglmError if they are not, UsageError where nobody can be asked.
    """
    listed = "".join(f"\n  {target.shown(run)}" for run in runs)
    what = f"{command} {plural(len(runs), 'run')}"
    answer = output.ask(f"autoglm: {what}?{listed}\n{what}?")
    if answer is None:
        raise UsageError(
            f"{' '.join(given)}: expected a yes to {what}, and there is no terminal to ask at:"
            f"{listed}",
            hint=f"say it with: {output.command(command, *given, '--yes')}",
        )
    if not answer:
        raise AutoglmError(f"{command}: nothing was done")


def each(those: Sequence[T], act: Callable[[T], None]) -> int:
    """Do it to each: what goes wrong with one hinders no other. Returns the first code but 0."""

    def done(one: T) -> int:
        act(one)
        return 0

    codes = [tried(partial(done, one)) for one in those]
    return next(filter(None, codes), 0)
