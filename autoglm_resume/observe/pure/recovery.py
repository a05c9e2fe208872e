"""Each failure of a run, and what followed. Pure; all durations are seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume import events
from autoglm_resume.events import OfRank
from autoglm_resume.observe.pure.say import failed, rejection
from autoglm_resume.observe.pure.segments import Segment, mono, step_of

_GONE = events.GroupFailed(kind="supervisor", summary="the supervisor died, and its ranks with it")


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
        failure = segment.last(events.GroupFailed)
        if failure is not None:
            found.append(_recovery(segment, failure, later))
        elif later and not segment.all(events.AttemptEnded, events.RunInterrupted):
            found.append(_recovery(segment, _GONE, later))
    return found


def rejected(gate: events.GatePassed | None) -> tuple[Rejected, ...]:
    """What a gate did not take."""
    verdicts = gate.verdicts if gate else ()
    return tuple(Rejected(v.id, v.step or 0, rejection(v)) for v in verdicts if not v.accepted)


def _recovery(segment: Segment, failure: events.GroupFailed, later: Sequence[Segment]) -> Recovery:
    following = later[0] if later else None
    decision = segment.last(events.DecisionMade)
    drills = segment.all(events.DrillFired)
    cause = _cause(failure, drills)
    stepped = next((s.stepped for s in later if s.stepped is not None), None)
    at_step = step_of(failure)
    gate = following.gate if following else None
    from_step = following.start_step if following else None
    return Recovery(
        attempt=segment.attempt,
        what=failed(failure),
        kind=failure.kind,
        rank=failure.root_rank,
        drills=tuple(drill.spec for drill in drills),
        at_step=at_step,
        detected=_since(cause, failure.mono),
        phases=_phases(cause, failure, segment, following),
        total=_since(cause if cause is not None else failure.mono, stepped),
        next_attempt=following.attempt if following else None,
        checkpoint=following.started.resume if following else None,
        from_step=from_step,
        checks=_checks(gate),
        rejected=rejected(gate),
        lost=max(0, at_step - from_step) if at_step is not None and from_step is not None else None,
        gave_up=decision.reason if decision and decision.action == "give_up" else "",
    )


def _cause(failure: events.GroupFailed, drills: Sequence[events.DrillFired]) -> float | None:
    """When it happened, None if only its detection is known.

    A drill says so just before it kills or stops; but one that lets a rank exit is announced long
    before.
    """
    struck = [mono(drill) for drill in drills if drill.kind != "exit"]
    if struck and failure.kind in ("killed", "crashed", "hang"):
        return max(struck)
    return failure.cause_mono


def _since(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def _phases(
    cause: float | None, failure: events.GroupFailed, segment: Segment, following: Segment | None
) -> tuple[tuple[str, float], ...]:
    detected = failure.mono
    stopped = segment.last(events.GroupStopped)
    moments: list[tuple[str, float | None]] = [
        ("", cause),
        ("detect", detected),
        ("stop", mono(stopped) if stopped else None),
    ]
    if following is not None and detected is not None:
        gate = following.gate
        if gate is not None:
            moments += [("wait", mono(gate) - gate.seconds), ("gate", mono(gate))]
        restored = following.all(events.StateRestored)
        restoring = [mono(event) - (event.seconds or 0.0) for event in restored]
        moments += [
            ("spawn", _latest(following, events.RankStarted)),
            ("set-up", max(restoring, default=None) or _latest(following, events.ModelReported)),
            ("restore", _latest(following, events.StateRestored)),
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


def _latest(segment: Segment, kind: type[OfRank]) -> float | None:
    return max(map(mono, segment.all(kind)), default=None)


def _checks(gate: events.GatePassed | None) -> tuple[str, ...]:
    accepted = (v for v in (gate.verdicts if gate else ()) if v.accepted)
    return tuple(check.name for v in accepted for check in v.checks)
