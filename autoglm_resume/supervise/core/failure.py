"""What was concluded of the end of a worker group; `diagnosis` concludes it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from autoglm_resume.failures import Kind


@dataclass(frozen=True)
class Previous:
    """What a journal has of the failure that ended the attempt before."""

    place: str
    step: int


@dataclass(frozen=True)
class Failure:
    """The conclusion."""

    kind: Kind
    rank: int | None
    """The rank that failed first, not one of those that failed because of it."""
    summary: str
    step: int
    """Steps completed by the furthest rank, -1 if none ran."""
    cause_mono: float | None = None
    traceback: str = ""
    code: int | None = None
    signal: int | None = None
    refused: str | None = None
    """Id of the checkpoint that the rank would not load."""
    hint: str = ""
    """What the rank said may be done about that."""
    final: bool = False
    """Whether these ranks would refuse it again, and the gate has nothing to learn from that."""
    place: str = ""
    """Where it happened, alike for failures that are the same: “train.py:31 in step”."""
    evidence: tuple[str, ...] = ()
    """What the class was concluded from, a sentence each."""
    tail: str = ""
    """Last lines of the root rank's log."""
