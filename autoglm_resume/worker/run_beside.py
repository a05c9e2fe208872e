"""The run that made the checkpoints which a script uses without its supervisor.

So a script alone leaves behind what `autoglm resume --from` left behind, and knows the replicas.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import events, files, journal, locks
from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.events import Event
from autoglm_resume.protocol.assignment import LARGEST_JOB
from autoglm_resume.protocol.relocation import relocated


@dataclass(frozen=True)
class RunBeside:
    """As much of a run as its checkpoints need; all empty where no run made them."""

    id: str = ""
    replicas: tuple[str, ...] = ()
    attempts: int = 0
    checkpointed: int = 0
    """Step of the newest checkpoint that was ever committed, 0 without one."""
    branches: tuple[Branch, ...] = ()
    """(step, attempt) where the run left newer checkpoints behind on purpose."""


def find(root: Path) -> RunBeside:
    """The run whose checkpoints are in `root`."""
    for directory in (*root.parents, _named_in(root / locks.CHECKPOINTS)):
        job = relocated(_read(directory / "job.json"), directory) if directory else {}
        how = job.get("checkpoint")
        # Anybody may have a job.json of their own.
        where = how.get("dir") if isinstance(how, dict) else None
        if directory and isinstance(where, str) and Path(where).resolve() == root.resolve():
            replicas = how.get("replicas") if isinstance(how, dict) else None
            known = replicas if isinstance(replicas, list) else []
            with contextlib.suppress(OSError):
                lines = journal.read(directory / "events.jsonl")
                return recall(lines, tuple(each for each in known if isinstance(each, str)))
    return RunBeside()


def recall(told: Iterable[Event], replicas: tuple[str, ...] = ()) -> RunBeside:
    """What a run's journal says of it, as far as it matters here."""
    id, attempts, checkpointed = "", 0, 0
    branches: list[Branch] = []
    for event in told:
        match event:
            case events.RunStarted(run_id=started):
                id = started
            case events.AttemptStarted(attempt=int(number)):
                attempts = max(attempts, number + 1)
            case events.Committed(step=step):
                checkpointed = max(checkpointed, step)
            case events.Branched(step=step, attempt=int(first)):
                branches.append(Branch(step, first))
                checkpointed = step
    return RunBeside(id, replicas, attempts, checkpointed, tuple(branches))


def _named_in(lock: Path) -> Path | None:
    run = _read(lock).get("run")
    return Path(run) if run and isinstance(run, str) else None


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(files.read(path, LARGEST_JOB))
        return found if isinstance(found, dict) else {}
    return {}
