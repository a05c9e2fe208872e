"""From a YAML file and `--set` overrides to a `Job`, or to every problem at once.

Each problem is one line, `job.yaml:12:3: checkpoint.evry: unknown key, did you mean 'every'?`, so
that editors and people jump to it. Paths are relative to the directory of the job file, `script`
to `workdir`; `~` and `$VARIABLES` are expanded in them, in `args` and in `env`, and `$$` is a `$`.
What an override holds is read as if it stood in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from autoglm_resume.checkpoint.store import retention
from autoglm_resume.job import checkpoint
from autoglm_resume.job.draft import Draft, Keys, Location
from autoglm_resume.job.paths import Paths
from autoglm_resume.job.spec import Job, sections

T = TypeVar("T")

_SECTIONS: Final = sections()


def load(path: str | Path, overrides: Sequence[str] = (), arguments: Sequence[str] = ()) -> Job:
    """The job in the file `path` with `overrides` such as `checkpoint.every.steps=50` applied, and
    its script given the further `arguments`.

    A Python script is the job that has it for `script`, and everything else by default; it runs
    where this is called, and has its runs there. Paths are absolute. Raises UsageError with one
    line per problem, all of them at once.
    """
    file = Path(path)
    draft, home = Draft(str(path)), file.parent.resolve()
    if file.suffix == ".py":
        draft.take_script(file)
        home = Path.cwd()
    else:
        draft.read_file(file)
    for override in overrides:
        draft.override(override)
    if draft.data.get("name") is None:
        draft.data["name"] = file.stem
    Paths(draft, home).check()
    draft.append_arguments(arguments)
    return _validated(draft)


def from_snapshot(
    data: Mapping[str, object], source: str = "the job recorded in the run directory"
) -> Job:
    """The job that `dump` wrote, as it was: nothing is expanded, and no file has to exist.

    Raises UsageError if it is not a complete job, for instance one of another version.
    """
    return _validated(Draft(source, dict(data), {(): Location((), source, source)}))


def keep_option(text: str) -> retention.KeepRules:
    """What `--keep TEXT` asks for, written as `checkpoint.keep` in a job file.

    Raises UsageError.
    """
    draft = Draft("--keep")
    draft.override(f"checkpoint.keep={text}", f"--keep {text}")
    if draft.problems:
        raise draft.refusal()
    return _kept(draft)


def keep_of(written: object, source: str) -> retention.KeepRules:
    """What `written`, the value of `checkpoint.keep` in `source`, asks for. Raises UsageError."""
    place = Location((), source, source)
    return _kept(Draft(source, {"checkpoint": {"keep": written}}, {(): place}))


def _kept(draft: Draft) -> retention.KeepRules:
    written = draft.data["checkpoint"]["keep"]
    return _checked(draft, lambda: checkpoint.keep(written), ("checkpoint", "keep"))


def _validated(draft: Draft) -> Job:
    return _checked(draft, lambda: Job.model_validate(draft.data))


def _checked(draft: Draft, validate: Callable[[], T], at: Keys = ()) -> T:
    """What `validate` makes of the draft's data at `at`. Raises UsageError with every problem."""
    found = None
    try:
        found = validate()
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            _explain(draft, each["type"], (*at, *each["loc"]), each["msg"])
    if draft.problems or found is None:
        raise draft.refusal()
    return found


def _explain(draft: Draft, kind: str, keys: Keys, message: str) -> None:
    if kind == "extra_forbidden":
        draft.refuse(keys, f"unknown key{_meant(keys)}", at_key=True)
    elif keys and keys[-1] == "[key]":  # so pydantic says that the key itself is wrong
        draft.refuse(keys[:-1], message, at_key=True)
    else:
        draft.refuse(keys, "missing" if kind == "missing" else message)


def _meant(keys: Keys) -> str:
    """`, did you mean 'every'?`, or nothing if no key is near."""
    wrong = str(keys[-1])
    siblings = _SECTIONS.get(tuple(map(str, keys[:-1])), ())
    near = difflib.get_close_matches(wrong, siblings, n=1)
    elsewhere = [".".join((*path, wrong)) for path, known in _SECTIONS.items() if wrong in known]
    meant = " or ".join(map(repr, elsewhere or near))
    return f", did you mean {meant}?" if meant else ""
