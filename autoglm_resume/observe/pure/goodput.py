"""A run in figures, from its journal alone. Pure; all durations are seconds.

Goodput is the time spent on steps that were kept, divided by the time that passed. A step is kept
if no later attempt began before it; the time for which saves block the ranks does not count.

Times are of the monotonic clock, so a wall clock that jumps changes nothing. Only between two
supervisors with a reboot in between is there nothing but the wall clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.recovery import Recovery, recoveries
from autoglm_resume.observe.pure.say import sentence
from autoglm_resume.observe.pure.segments import (
    ENDS,
    Life,
    Segment,
    attempts,
    lives,
    mono,
    step_of,
)

State = Literal[
    "starting", "training", "recovering", "paused", "finished", "interrupted", "failed", "dead"
]

_ENDS: dict[type[Event], State] = dict(
    zip(ENDS, ("finished", "interrupted", "failed"), strict=True)
)


@dataclass(frozen=True)
class AttemptSummary:
    """One launch of the worker group."""

    number: int
    began: float | None
    """Unix seconds."""
    start_step: int
    """Step of the checkpoint it began with, 0 without one."""
    checkpoint: str | None
    last_step: int | None
    """Steps completed by the furthest rank, None if that is not known."""
    outcome: str | None
    """None while it runs, or if the supervisor died before it could say."""


@dataclass(frozen=True)
class Summary:
    """Everything that is shown of a run."""

    name: str
    run_id: str
    state: State
    world_size: int | None
    began: float | None
    """Unix seconds."""
    attempts: tuple[AttemptSummary, ...]
    recoveries: tuple[Recovery, ...]
    step: int | None
    """Steps completed, as far as the journal knows; None if the script does not report steps."""
    checkpoint: str | None
    """The newest one that was committed."""
    checkpoint_step: int | None
    save_failures: int
    saves_skipped: int
    """Left out because the one before was still under way."""
    interval: str
    """How often it saves and why, where that is left to autoglm."""
    elapsed: float
    """From the first start to the end (or to now), pauses between supervisors included."""
    down: float
    """The part of it in which no supervisor lived."""
    kept: float | None
    """Time spent on kept steps, without saves; None if the script does not report steps."""
    saving: float
    """Time for which saves blocked them."""
    objects: dict[str, str]
    """Digests of the newest checkpoint's objects: of the final state, once finished."""
    code: int | None
    """Exit code of the last supervisor, None if it did not say."""
    reason: str
    """Why the run ended, if it did not finish."""
    waiting: str = ""
    """What was decided last, while no attempt has followed it."""

    @property
    def goodput(self) -> float | None:
        """From 0 to 1."""
        if self.kept is None or self.elapsed <= 0:
            return None
        return min(1.0, max(0.0, self.kept / self.elapsed))


def summarize(
    journal: Iterable[Event], *, alive: bool = False, now: float | None = None
) -> Summary:
    """The run of this journal, oldest event first.

    `alive`: whether a supervisor has the run; `now`: then the monotonic time on its machine.
    """
    supervisors = lives(journal)
    everything = [event for life in supervisors for event in life.events]
    segments = attempts(everything)
    last_life = _last_of_its_own(supervisors)
    state = _state(last_life, segments, alive)
    now = now if alive else None
    elapsed, down = _elapsed(supervisors, now)
    kept, saving = _kept(segments, state, now)
    started = next((e for e in everything if isinstance(e, events.RunStarted)), None)
    end = next((e for e in reversed(last_life) if isinstance(e, ENDS)), None)
    newest = _newest_checkpoint(everything)
    interval = next((e for e in reversed(everything) if isinstance(e, events.SaveInterval)), None)
    step = step_of(end)
    if step is None and segments:
        step = max(segments[-1].last_step or 0, segments[-1].start_step)
    completed = end.objects if isinstance(end, events.RunCompleted) else {}
    failed = end if isinstance(end, events.RunInterrupted | events.RunFailed) else None
    return Summary(
        name=started.name if started else "",
        run_id=started.run_id if started else "",
        state=state,
        world_size=started.world_size if started else None,
        began=started.time if started else None,
        attempts=tuple(map(_attempt, segments)),
        recoveries=tuple(recoveries(segments)),
        step=step if step or _speaks(segments) else None,
        checkpoint=newest.id if newest else None,
        checkpoint_step=step_of(newest),
        save_failures=sum(isinstance(e, events.PartFailed) for e in everything),
        saves_skipped=sum(isinstance(e, events.SaveSkipped) for e in everything),
        interval=interval.reason if interval else "",
        elapsed=elapsed,
        down=down,
        kept=kept,
        saving=saving,
        objects=_objects(completed or (newest.objects if newest else {})),
        code=0 if state == "finished" else failed.code if failed else None,
        reason=failed.reason if failed else "",
        waiting=_waiting(last_life, segments) if state in ("recovering", "paused") else "",
    )


def _last_of_its_own(supervisors: Sequence[Life]) -> Sequence[Event]:
    """What the last supervisor wrote that was not given another job, and refused it."""
    for life in reversed(supervisors):
        if not any(isinstance(event, events.JobKept) for event in life.events):
            return life.events
    return []


def _state(life: Sequence[Event], segments: Sequence[Segment], alive: bool) -> State:
    for event in reversed(life):
        if isinstance(event, ENDS):
            return _ENDS[type(event)]
    if not alive:
        return "dead"
    latest = segments[-1] if segments else None
    going = latest is not None and latest.started in life and not latest.all(events.GroupFailed)
    sign = events.FirstStep if _speaks(segments) else events.RankStarted
    if latest is not None and going and latest.all(sign):
        return "training"
    undone = _undone(life, segments)
    if undone is not None and undone.action == "pause":
        return "paused"
    return "recovering" if segments and (len(segments) > 1 or not going) else "starting"


def _speaks(segments: Sequence[Segment]) -> bool:
    """Whether the script says that it steps; that the ranks run has to do for one that does not."""
    signs = (events.ModelReported, events.StateRestored, events.FirstStep)
    return any(segment.all(*signs) for segment in segments)


def _undone(life: Sequence[Event], segments: Sequence[Segment]) -> events.DecisionMade | None:
    """The present supervisor's decision that no attempt has followed yet."""
    decision = segments[-1].last(events.DecisionMade) if segments else None
    return decision if decision in life else None


def _waiting(life: Sequence[Event], segments: Sequence[Segment]) -> str:
    decision = _undone(life, segments)
    return (sentence(decision) or "") if decision else ""


def _elapsed(supervisors: Sequence[Life], now: float | None) -> tuple[float, float]:
    """(all the time that passed, the part of it without a supervisor)."""
    lived = sum(life.end - life.begin for life in supervisors)
    if supervisors and now is not None:
        lived += max(0.0, now - supervisors[-1].end)
    down = sum(_between(before, after) for before, after in itertools.pairwise(supervisors))
    return lived + down, down


def _between(before: Life, after: Life) -> float:
    if before.boot and before.boot == after.boot:
        return max(0.0, after.begin - before.end)
    last = max(_wall(before), default=0.0)
    return max(0.0, min(_wall(after), default=last) - last)


def _wall(life: Life) -> list[float]:
    """Unix seconds of its events; what `autoglm prune` adds has no monotonic time and is none."""
    own = (event for event in life.events if event.mono is not None)
    return [event.time for event in own if event.time is not None]


def _kept(
    segments: Sequence[Segment], state: State, now: float | None
) -> tuple[float | None, float]:
    """(time on kept steps without saves, time of the saves among them)."""
    unheard = state in ("finished", "training") or not _speaks(segments)
    if unheard and not any(s.all(events.FirstStep) for s in segments):
        return None, 0.0
    kept = saving = 0.0
    limit: int | None = None
    if state not in ("finished", "training", "recovering"):
        # Nobody goes on: what no checkpoint holds would have to be run again.
        limit = _checkpointed(segments)
    for segment in reversed(segments):
        begin = segment.stepping_since
        end = _kept_until(segment, limit, now if segment is segments[-1] else None)
        if segment.all(events.GroupFailed) and segment is segments[-1]:
            end = _kept_until(segment, _checkpointed([segment]), None)
        if begin is not None and end is not None and end > begin:
            blocked = min(_blocked(segment, begin, end), end - begin)
            kept += end - begin - blocked
            saving += blocked
        start = segment.start_step
        limit = start if limit is None else min(limit, start)
    return kept, saving


def _kept_until(segment: Segment, limit: int | None, now: float | None) -> float | None:
    last = segment.last_step
    if limit is None or (last is not None and limit > last):
        return now if now is not None else segment.reached(last) if last is not None else None
    return segment.reached(limit) if limit > segment.start_step else None


def _checkpointed(segments: Sequence[Segment]) -> int:
    committed = (step_of(e) for s in segments for e in s.all(events.Committed))
    starts = (segment.start_step for segment in segments)
    return max(max((s for s in committed if s is not None), default=0), max(starts, default=0))


def _blocked(segment: Segment, begin: float, end: float) -> float:
    """Time between `begin` and `end` in which saves blocked; the slowest rank holds up the rest."""
    longest: dict[str, float] = {}
    for saved in segment.all(events.PartSaved):
        if saved.began is None or saved.blocked is None:
            continue
        inside = min(end, saved.began + saved.blocked) - max(begin, saved.began)
        longest[saved.id] = max(longest.get(saved.id, 0.0), inside)
    return sum(longest.values())


def _newest_checkpoint(journal: Iterable[Event]) -> events.Committed | None:
    """The last one committed that is there, and that no gate has rejected since; or the one a gate
    fell back to. What a gate finds of a job that is not the run's own does not count.
    """
    committed: dict[str, events.Committed] = {}
    rejected: set[str] = set()
    before: set[str] = set()
    for event in journal:
        match event:
            case events.Committed():
                committed[event.id] = event
            case events.Pruned(id=id) | events.Quarantined(id=id):
                committed.pop(id, None)
            case events.GatePassed():
                for verdict in event.verdicts:
                    (rejected.discard if verdict.accepted else rejected.add)(verdict.id)
            case events.SupervisorStarted():
                before = set(rejected)
            case events.JobKept():
                rejected = before
    there = (event for id, event in committed.items() if id not in rejected)
    return max(there, key=lambda e: (step_of(e) or 0, mono(e)), default=None)


def _attempt(segment: Segment) -> AttemptSummary:
    ended = segment.last(events.AttemptEnded)
    return AttemptSummary(
        number=segment.attempt,
        began=segment.started.time,
        start_step=segment.start_step,
        checkpoint=segment.started.resume,
        last_step=segment.last_step,
        outcome=ended.outcome if ended else None,
    )


def _objects(found: Mapping[str, str]) -> dict[str, str]:
    """`model` first, then the others by name."""
    names = sorted(found, key=lambda name: (name != "model", name))
    return {name: found[name] for name in names}
