"""Whether a run that nobody has is to be continued without a person. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoglm_resume import events
from autoglm_resume.errors import Interrupted, RunLocked
from autoglm_resume.events import Event

MATTERS = (1, 90, 93, 2)
"""Exit codes that need a person, the most urgent first."""


@dataclass(frozen=True)
class Standing:
    """Whether to go on, and why or why not."""

    goes_on: bool
    why: str


def of(journal: Sequence[Event]) -> Standing:
    """What the journal of a run that no supervisor has says about going on.

    It is left alone if it is finished, if its last supervisor gave it up (exit codes 1, 2, 90 and
    93), and if that was part of a Slurm job, which Slurm starts again. A supervisor that was given
    another job, and refused it, is not one of the run.
    """
    ended: Event | None = None
    job: str | None = None
    before: tuple[Event | None, str | None] = None, None
    for event in journal:
        match event:
            case events.RunCompleted() | events.RunFailed() | events.RunInterrupted():
                ended = event
            case events.Branched():
                ended = None
            case events.SupervisorStarted():
                before, job = (ended, job), None
                # A look at a finished run starts no supervisor, so this one went on with it.
                ended = None
            case events.Slurm():
                job = event.job
            case events.JobKept():
                ended, job = before
    match ended:
        case events.RunCompleted(step=step):
            at = "" if step == -1 else f" at step {'?' if step is None else step}"
            return Standing(False, f"finished{at}")
        case events.RunFailed(code=code, reason=reason):
            why = reason or "no reason was recorded"
            return Standing(False, f"left alone, exit code {'?' if code is None else code}: {why}")
    if job is not None:
        return Standing(False, f"left to Slurm; continue it with: scontrol requeue {job}")
    if isinstance(ended, events.RunInterrupted):
        return Standing(True, f"interrupted: {ended.reason or 'no reason was recorded'}")
    return Standing(True, "its supervisor died" if journal else "it never began")


def worst(codes: Iterable[int]) -> int:
    """The exit code for several runs: what needs a person, then a death, then an interruption."""
    found = {code for code in codes if code != RunLocked.exit_code}
    for code in MATTERS:
        if code in found:
            return code
    return max(found - {Interrupted.exit_code}, default=0) or max(found, default=0)
