"""From a YAML file and `--set` overrides to a `Job`, or to every problem at once.

Each problem is one line, `job.yaml:12:3: checkpoint.evry: unknown key, did you mean 'every'?`, so
that editors and people jump to it. Paths are relative to the directory of the job file, `script`
to `workdir`; `~` and `$VARIABLES` in them are expanded. What an override holds is read as if it
stood in the file, paths included.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from autoglm_resume.job.draft import Draft, Keys, Place
from autoglm_resume.job.paths import Paths
from autoglm_resume.job.spec import Job, sections

_SECTIONS: Final = sections()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the file `path` with `overrides` such as `checkpoint.every.steps=50` applied.

    Its paths are absolute. Raises UsageError with one line per problem, all of them at once.
    """
    file = Path(path)
    draft = Draft(str(path))
    draft.read_file(file)
    for override in overrides:
        draft.override(override)
    if draft.data.get("name") is None:
        draft.data["name"] = file.stem
    Paths(draft, file.parent.resolve()).check()
    return _validated(draft)


def from_snapshot(
    data: Mapping[str, object], source: str = "the job recorded in the run directory"
) -> Job:
    """The job that `dump` wrote, as it was: nothing is expanded, and no file has to exist.

    Raises UsageError if it is not a complete job, for instance one of another version.
    """
    return _validated(Draft(source, dict(data), {(): Place((), source, source)}))


def _validated(draft: Draft) -> Job:
    job = None
    try:
        job = Job.model_validate(draft.data)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            _explain(draft, each["type"], each["loc"], each["msg"])
    if draft.problems or job is None:
        raise draft.refusal()
    return job


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
