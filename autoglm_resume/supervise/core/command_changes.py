"""What of a run's command is another one now: a run is its arguments too. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from autoglm_resume.checkpoint.format.origin import Origin, differences
from autoglm_resume.job import secret
from autoglm_resume.job.spec import Job


def command_changes(before: Mapping[str, Any], now: Job, *, remains: bool = False) -> list[str]:
    """In words, between the job that a run has had, as it is kept, and the one it gets now.

    A script that was moved is the same, unless that of `before` `remains` where it was; what is
    hidden in arguments is not compared.
    """
    then = before.get("script") or before.get("module")
    there = now.script or now.module
    found = differences(_origin(before.get("args") or ()), _origin(now.args))
    renamed = then and there and PurePath(str(then)).name != PurePath(there).name
    if renamed or (remains and then and there and str(then) != str(there)):
        found.insert(0, f"script: {then} then, {there} now")
    return found


def _origin(args: Sequence[Any]) -> Origin:
    return Origin("", "script", "", tuple(secret.arguments([str(arg) for arg in args])))
