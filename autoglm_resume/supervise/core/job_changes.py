"""What of a run's job is another one now: a run is its arguments, and what its job says. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from autoglm_resume.checkpoint.format.origin import Origin, differences
from autoglm_resume.job import secret

_LENGTH = re.compile(
    r"(-*((max|total|num|train|limit|steps?|epochs?|iters?|iterations?)[-_.]?)+"
    r"|argument \d+: \d+ then, \d+ now$)(:.*)?"
)
_COMMAND = ("script", "module", "args")
_NOT_GIVEN: tuple[object, ...] = (None, [], {}, "")


@dataclass(frozen=True)
class JobChanges:
    """In words, “--lr: 0.1 then, 0.2 now”, and without what is secret."""

    command: tuple[str, ...] = ()
    """Script and arguments."""
    variables: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """All else."""
    skip: tuple[str, ...] = ()
    """What is new in `checkpoint.skip`."""

    @property
    def told(self) -> tuple[str, ...]:
        """What the script is told: with this changed, a finished run may have more to do."""
        return (*self.command, *self.variables)

    @property
    def may_be_restored(self) -> bool:
        """Whether an argument changed that a checkpoint may know better, such as `--lr`: any that
        does not just say how long to train.
        """
        return not all(_LENGTH.fullmatch(each) for each in self.command)

    @property
    def all(self) -> tuple[str, ...]:
        """Everything."""
        return (*self.told, *self.settings)


def job_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, remains: bool = False
) -> JobChanges:
    """Between the dumped job that a run has had and the one it gets now.

    A script that was moved is the same, unless that of `before` `remains` where it was, and so is a
    path that lies to the run as it did. What is hidden in arguments is not compared.
    """
    one, other = dict(_leaves(_but(before), ())), dict(_leaves(_but(now), ()))
    seen = [dict(_leaves(_but(secret.shown(job)), ())) for job in (before, now)]
    homes = str(before["run_dir"]), str(now["run_dir"])
    variables: list[str] = []
    settings: list[str] = []
    for keys in dict.fromkeys((*one, *other)):
        then, here = one.get(keys), other.get(keys)
        if then == here or _meant(then, homes[0]) == _meant(here, homes[1]):
            continue
        shown = [_shown(each.get(keys)) for each in seen]
        values = f"{shown[0]} then, {shown[1]} now"
        text = f"{'.'.join(keys)}: {values if shown[0] != shown[1] else 'another one now (hidden)'}"
        (variables if keys[0] == "env" else settings).append(text)
    skip, known = now["checkpoint"]["skip"], before["checkpoint"]["skip"]
    return JobChanges(
        tuple(_command(before, now, remains=remains)),
        tuple(variables),
        tuple(settings),
        tuple(name for name in skip if name not in known),
    )


def _command(before: Mapping[str, Any], now: Mapping[str, Any], *, remains: bool) -> list[str]:
    then, there = (job.get("script") or job.get("module") for job in (before, now))
    found = differences(_origin(before["args"]), _origin(now["args"]))
    renamed = then and there and PurePath(then).name != PurePath(there).name
    if renamed or (remains and then and there and then != there):
        found.insert(0, f"script: {then} then, {there} now")
    return found


def _origin(args: Sequence[str]) -> Origin:
    return Origin("", "script", "", tuple(secret.arguments(args)))


def _but(job: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in job.items() if key not in (*_COMMAND, "run_dir")}


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Sections are looked into, lists are one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, str(key)))
    elif value not in _NOT_GIVEN:
        yield keys, value


def _meant(value: Any, home: str) -> Any:
    """With paths as they lie to the run, which may have been moved with them."""
    if isinstance(value, list | tuple):
        return [_meant(each, home) for each in value]
    if isinstance(value, str) and value.startswith("/"):
        return posixpath.relpath(value, home)
    return value


def _shown(value: Any) -> str:
    if value in _NOT_GIVEN:
        return "not given"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in value.items())}}}"
    return str(value)
