"""Each failure of a run, and what followed. Pure; all durations are seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume.journal import Event
from autoglm_resume.observe.pure.say import entries, failed, rejection
from autoglm_resume.observe.pure.segments import Segment, mono, number, step_of


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that the gate did not take, and why."""

    id: str
    step: int
    reason: str


@dataclass(frozen=True)
class Recovery:
    """One failure and what followed; None where the journal does not know (yet)."""

    attempt: int
    """The attempt that failed."""
    what: str
    kind: str
    rank: int | None
    """The rank that failed first."""
    drills: tuple[str, ...]
    """The drills that caused it, as they were ordered; none if it was real."""
    at_step: int | None
    """Steps that were complete."""
    detected: float | None
    """From the cause to its detection."""
    phases: tuple[tuple[str, float], ...]
    """What the time from the cause to the next completed step went to, in its order."""
    total: float | None
    """From the cause to the next completed step, however many attempts that took."""
    next_attempt: int | None
    checkpoint: str | None
    """What the next attempt began with, None for the beginning."""
    from_step: int | None
    """Its step."""
    checks: tuple[str, ...]
    """What it was accepted on."""
    rejected: tuple[Rejected, ...]
    """Newer checkpoints that were not taken."""
    lost: int | None
    """Steps that were complete and had to be run again."""
    gave_up: str
    """Why the run ended here, empty if it went on."""


def recoveries(segments: Sequence[Segment]) -> list[Recovery]:
    """One for each attempt that failed, or whose supervisor died."""
    found = []
    for index, segment in enumerate(segments):
        later = segments[index + 1 :]
        failure = segment.last("failure")
        if failure is not None:
            found.append(_recovery(segment, failure, later))
        elif later and not segment.all("attempt_ended", "run_interrupted"):
            gone: Event = {
                "event": "failure",
                "kind": "supervisor",
                "summary": "the supervisor died, and its ranks with it",
            }
            found.append(_recovery(segment, gone, later))
    return found


def rejected(gate: Event | None) -> tuple[Rejected, ...]:
    """What a gate did not take."""
    return tuple(
        Rejected(str(v.get("id", "")), step_of(v) or 0, rejection(v))
        for v in entries((gate or {}).get("verdicts"))
        if not v.get("accepted")
    )


def _recovery(segment: Segment, failure: Event, later: Sequence[Segment]) -> Recovery:
    following = later[0] if later else None
    decision = segment.last("decision") or {}
    drills = segment.all("drill")
    cause = _cause(failure, drills)
    stepped = next((s.stepped for s in later if s.stepped is not None), None)
    at_step = step_of(failure)
    gate = following.gate if following else None
    from_step = following.start_step if following else None
    rank = number(failure, "root_rank")
    return Recovery(
        attempt=segment.attempt,
        what=failed(failure),
        kind=str(failure.get("kind", "")),
        rank=int(rank) if rank is not None else None,
        drills=tuple(str(drill.get("spec", "drill")) for drill in drills),
        at_step=at_step,
        detected=_since(cause, number(failure, "mono")),
        phases=_phases(cause, failure, segment, following),
        total=_since(cause if cause is not None else number(failure, "mono"), stepped),
        next_attempt=following.attempt if following else None,
        checkpoint=following.started.get("resume") if following else None,
        from_step=from_step,
        checks=_checks(gate),
        rejected=rejected(gate),
        lost=max(0, at_step - from_step) if at_step is not None and from_step is not None else None,
        gave_up=str(decision.get("reason", "")) if decision.get("action") == "give_up" else "",
    )


def _cause(failure: Event, drills: Sequence[Event]) -> float | None:
    """When it happened, None if only its detection is known.

    A drill says so just before it kills or stops; but one that lets a rank exit is announced long
    before.
    """
    known = number(failure, "cause_mono")
    struck = [mono(d) for d in drills if d.get("kind") != "exit"]
    if struck and failure.get("kind") in ("killed", "crashed", "hang"):
        return max(struck)
    return known


def _since(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def _phases(
    cause: float | None, failure: Event, segment: Segment, following: Segment | None
) -> tuple[tuple[str, float], ...]:
    detected = number(failure, "mono")
    stopped = segment.last("group_stopped")
    moments: list[tuple[str, float | None]] = [
        ("", cause),
        ("detect", detected),
        ("stop", mono(stopped) if stopped else None),
    ]
    if following is not None and detected is not None:
        gate = following.gate
        if gate is not None:
            begun = mono(gate) - (number(gate, "seconds") or 0.0)
            moments += [("wait", begun), ("gate", mono(gate))]
        restored = following.all("restored")
        restoring = [mono(e) - (number(e, "seconds") or 0.0) for e in restored]
        moments += [
            ("spawn", max(map(mono, following.all("rank_started")), default=None)),
            ("set-up", max(restoring, default=None) or _latest(following, "model")),
            ("restore", _latest(following, "restored")),
            ("first step", following.stepped),
        ]
    phases = []
    before: float | None = None
    for name, at in moments:
        if at is None:
            continue
        if before is not None:
            phases.append((name, max(0.0, at - before)))
        before = max(at, before or at)
    return tuple(phases)


def _latest(segment: Segment, name: str) -> float | None:
    return max(map(mono, segment.all(name)), default=None)


def _checks(gate: Event | None) -> tuple[str, ...]:
    accepted = (v for v in entries((gate or {}).get("verdicts")) if v.get("accepted"))
    return tuple(str(check.get("name")) for v in accepted for check in entries(v.get("checks")))
