"""Events of a start that was given more than a job, or another one than the run had. Pure."""

from __future__ import annotations

from autoglm_resume.events.base import Event
from autoglm_resume.records import unsaid


class BegunFrom(Event):
    """The run has objects of a checkpoint at step 0, which was verified, as `Beginning` says."""

    path: str
    step: int = 0
    digest: str = ""
    only: tuple[str, ...] = ()


class JobChanged(Event):
    """The run goes on with another job than it was started with last."""

    changes: tuple[str, ...] = ()
    """What is another now, in words, without what is secret."""
    finished: bool = False
    """Whether the run was finished, and goes on because the script is told otherwise now."""
    skip: tuple[str, ...] = unsaid(())
    """What is new in `checkpoint.skip`: checkpoints so far do not give it back any more."""


class JobKept(Event):
    """The start before, which failed, was that of another job: the run is what it was before it."""

    reason: str = ""
    """Why it was refused."""
    finished: bool = unsaid(False)
    """Whether the run was finished before, and so is again."""
