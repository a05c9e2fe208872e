"""What DCP's users call a checkpoint, and where ours is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

from autoglm_resume.checkpoint.format.ids import checkpoint_id, is_id
from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError

AnyPath: TypeAlias = "str | os.PathLike[str]"

TOKEN = "dcp"
METADATA = "dcp"
"""The object, of the coordinator alone, that holds DCP's metadata."""

_NUMBERED = re.compile(r".*?(\d{1,18})\Z", re.DOTALL)


def directory_of(path: AnyPath) -> Path:
    """Where the checkpoint is that DCP's users call `path`: of `ckpts/step-100`, `ckpts/100` and
    `ckpts/global_step100` it is `ckpts/step-0000000100.dcp`, which stands for itself.

    Raises UsageError when the name ends in no number.
    """
    given = Path(path)
    if is_id(given.name):
        return given
    numbered = _NUMBERED.match(given.name)
    if numbered is None:
        raise UsageError(
            f"{given}: expected a name that ends in the step, as step-100",
            hint="one directory holds the checkpoints of one run, each known by its step",
        )
    return given.with_name(checkpoint_id(int(numbered[1]), TOKEN))


def is_numbered(path: AnyPath) -> bool:
    """Whether `directory_of` takes it."""
    name = Path(path).name
    return is_id(name) or _NUMBERED.match(name) is not None


def newest(root: AnyPath) -> Path | None:
    """The newest checkpoint of a Writer under `root` that proves good, None if there is none.

    One whose files were not touched since they were read back is trusted; others are read whole.
    Ask on one rank and tell the others, lest they find different ones.
    """
    for candidate in candidates(Store(Path(root))):
        parts = candidate.manifest.parts if candidate.manifest else ()
        if candidate.integrity.ok and any(METADATA in part.objects for part in parts):
            return Path(candidate.path)
    return None


def given(path: Path | None) -> Path:
    """Raises UsageError when there is none."""
    if path is None:
        raise UsageError("no checkpoint named", hint='give DCP a checkpoint_id="…/step-100"')
    return path
