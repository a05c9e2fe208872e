"""What to do after a failure. Pure: the history goes in, a decision comes out.

Three things end a run that cannot go on, whichever comes first:

- errors spend `max_restarts`, which new checkpointed steps refill; preemptions and requeues do not;
- failures without progress: those that would come again end the run after `without_progress`; for
  those that time may heal a circuit breaker opens (closed → open for `cool_down` → half-open: one
  try), and closes with the first progress; after `cool_downs` of them in a row it gives up;
- more failures within a `window` of time than are worth it, progress or not.

History is the attempts that failed, as the journal has them (`history.recall`); nothing else is
remembered, so that the next life of a supervisor decides as this one would have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from autoglm_resume.errors import AutoglmError, CheckpointError, DoNotRequeue, UsageError
from autoglm_resume.failures import TRAITS, Answer, Kind
from autoglm_resume.job.units import format_duration
from autoglm_resume.supervise.core.failure import Failure

FEW = 10
"""Steps within which a failure comes right after the checkpoint that the attempt began with."""

Breaker = Literal["closed", "open", "half-open"]


@dataclass(frozen=True)
class Rules:
    """The job's `restart` and what it can make use of here; times in seconds."""

    max_restarts: int
    backoff: float
    max_backoff: float
    without_progress: int
    cool_down: float = 300.0
    cool_downs: int = 3
    failures: int = 100
    """More of them `within` so many seconds end the run."""
    within: float = 3600.0
    longest_pause: float = 86400.0
    on: Mapping[str, Answer] = field(default_factory=dict)
    """Answers by failure class, exit code, or /pattern/."""
    scheduler: bool = False
    """Whether one started this process, and would start it again after exit code 75."""
    can_shrink: bool = False
    """Whether the run can go on without one rank's GPU."""


@dataclass(frozen=True)
class Ended:
    """One attempt that failed."""

    started_from: int
    """Step of the checkpoint it began with, 0 without one."""
    furthest: int
    """Steps completed by the furthest rank, -1 if none ran."""
    checkpointed: int
    """Step of the newest checkpoint committed when it ended, 0 without one."""
    lived: float | None = None
    """Seconds it ran, where no rank had a session: such a script reports no steps."""
    refused: str | None = None
    """Id of the checkpoint that a rank would not load, if that ended it."""
    kind: Kind = Kind.UNKNOWN
    place: str = ""
    """See `Failure.place`."""
    time: float = 0.0
    """Unix seconds."""
    action: str = ""
    """How it was answered, empty before it is."""


@dataclass(frozen=True)
class RestartGroup:
    """Start the group again after `delay` seconds."""

    delay: float
    reason: str
    breaker: Breaker = "closed"
    action = "restart"


@dataclass(frozen=True)
class RollBack:
    """The same, from an older checkpoint than that of step `before`, or than the newest there is.

    Where there is no older one it is a restart.
    """

    delay: float
    reason: str
    before: int | None = None
    action = "roll_back"
    breaker: Breaker = "closed"


@dataclass(frozen=True)
class Smaller:
    """Start it again at once, without the GPU of `rank`."""

    rank: int
    reason: str
    action = "smaller"
    delay = 0.0
    breaker: Breaker = "closed"


@dataclass(frozen=True)
class Pause:
    """Start it again when `until` holds, if that is within `longest` seconds."""

    until: Literal["space", "storage"]
    longest: float
    reason: str
    action = "pause"
    delay = 0.0
    breaker: Breaker = "closed"


@dataclass(frozen=True)
class Requeue:
    """Exit with code 75: the scheduler is to start it again, perhaps elsewhere."""

    reason: str
    action = "requeue"
    delay = 0.0
    breaker: Breaker = "closed"


@dataclass(frozen=True)
class GiveUp:
    """End the run with exit code `code`."""

    reason: str
    code: int
    hint: str = ""
    """What a person may do."""
    action = "give_up"
    delay = 0.0
    breaker: Breaker = "closed"


Decision = RestartGroup | RollBack | Smaller | Pause | Requeue | GiveUp


def decide(
    history: Sequence[Ended], failure: Failure, rules: Rules, now: float, jitter: float
) -> Decision:
    """Answer the last failure in `history` (oldest first, that one included).

    `now` is Unix seconds. The first restart after progress is immediate; then the delay doubles,
    and `jitter`, in [0, 1), takes up to half of it off so that many runs do not return at once.
    """
    if failure.code == DoNotRequeue.exit_code:
        return GiveUp("the job asked not to be run again (exit code 93)", DoNotRequeue.exit_code)
    if failure.kind is Kind.USAGE_ERROR:
        return GiveUp(failure.summary, UsageError.exit_code, failure.hint)
    asked, because = _asked(failure, rules)
    if asked is Answer.STOP:
        return GiveUp(f"restart.on has {because}: stop: {failure.summary}", AutoglmError.exit_code)
    if asked is None and TRAITS[failure.kind].answer is Answer.STOP:
        return GiveUp(failure.summary, AutoglmError.exit_code)
    if failure.kind is Kind.REFUSED:
        return _answer_refusal(history, failure)
    decision = _bounded(history, failure, rules, now, jitter, asked)
    if asked and (reason := _impossible(asked, failure, rules)):
        note = f"restart.on has {because}: {asked.value}, but {reason}"
        decision = replace(decision, reason=f"{decision.reason}; {note}")
    return decision


def _bounded(
    history: Sequence[Ended],
    failure: Failure,
    rules: Rules,
    now: float,
    jitter: float,
    asked: Answer | None,
) -> Decision:
    """The answer that is `asked` for, or natural, if it is possible here and worth another try."""
    tally = _tally(history, rules, now)
    traits = TRAITS[failure.kind]
    answer = _possible(asked or traits.answer, failure, rules)
    if answer is Answer.REQUEUE:
        tried = tally.stuck + tally.requeued
        if not traits.free and tried >= rules.without_progress:
            return _hopeless(tried, failure)
        return Requeue(failure.summary)
    if not traits.free and (over := _overspent(tally, rules)):
        return GiveUp(f"{over}: {failure.summary}", AutoglmError.exit_code)
    if answer is Answer.SMALLER:
        assert failure.rank is not None  # or it would not be possible
        return Smaller(failure.rank, failure.summary)
    stuck = tally.idle if traits.free else tally.stuck
    if stuck >= rules.without_progress:
        heals = traits.heals or tally.alike < rules.without_progress
        if answer is Answer.ROLL_BACK or not (heals or asked):
            return _hopeless(stuck, failure)
        return _cool_down(stuck, failure, rules)
    if answer is Answer.PAUSE:
        what: Literal["space", "storage"] = "storage" if failure.kind is Kind.STORAGE else "space"
        return Pause(what, rules.longest_pause, failure.summary)
    reason = "it had made progress" if stuck == 0 else f"{_times(stuck)} without new progress"
    doubled = min(rules.max_backoff, rules.backoff * 2.0 ** (stuck - 1)) if stuck else 0.0
    delay = doubled * (1 - jitter / 2)
    if answer is Answer.ROLL_BACK or (asked is None and _right_after_one_checkpoint(history)):
        # What an attempt that got nowhere began with is not good enough, whatever it saved since.
        before = history[-1].started_from if tally.idle else 0
        return RollBack(delay, reason, before or None)
    return RestartGroup(delay, reason)


def remaining(delay: float, since: float, now: float) -> float:
    """Seconds left of a wait of `delay` that began at `since`; Unix times, of any two clocks."""
    return min(delay, max(0.0, since + delay - now))


@dataclass(frozen=True)
class _Tally:
    stuck: int = 0
    """Errors in a row that came no further than the run had come."""
    requeued: int = 0
    """Those among them, not counted there, that were answered by a requeue."""
    preempted: int = 0
    """Attempts among them that ended in what the run cannot help."""
    alike: int = 0
    """How many of the last that are stuck failed as the very last did."""
    spent: int = 0
    """Errors since the last new checkpoint."""
    recent: int = 0
    """Errors within the window."""

    @property
    def idle(self) -> int:
        """Attempts in a row that came no further."""
        return self.stuck + self.requeued + self.preempted


def _tally(history: Sequence[Ended], rules: Rules, now: float) -> _Tally:
    """Of a script without a session nothing is known but how long it ran: more than `max_backoff`
    seconds count as progress.
    """
    tally = _Tally()
    furthest = checkpointed = history[0].started_from if history else 0
    error: Ended | None = None
    for attempt in history:
        if attempt.refused is not None:
            continue  # it never ran
        silent = attempt.lived is not None and attempt.lived > rules.max_backoff
        if silent or attempt.furthest > furthest:
            tally = _Tally(spent=tally.spent, recent=tally.recent)
            come_to_nothing = 0
        else:
            come_to_nothing = 1
        if silent or attempt.checkpointed > checkpointed:
            tally = replace(tally, spent=0)
        furthest = max(furthest, attempt.furthest)
        checkpointed = max(checkpointed, attempt.checkpointed)
        if TRAITS[attempt.kind].free:
            tally = replace(tally, preempted=tally.preempted + come_to_nothing)
        elif attempt.action == Answer.REQUEUE.value:
            tally = replace(tally, requeued=tally.requeued + come_to_nothing)
        else:
            alike = error is not None and _likeness(error) == _likeness(attempt)
            error = attempt
            tally = replace(
                tally,
                stuck=tally.stuck + come_to_nothing,
                alike=(tally.alike if alike else 0) + come_to_nothing,
                spent=tally.spent + 1,
                # A clock that was set back must not make old failures new.
                recent=tally.recent + (0 <= now - attempt.time < rules.within),
            )
    return tally


def _likeness(attempt: Ended) -> tuple[Kind, str]:
    """Equal for failures that are the same."""
    kind = Kind.EXCEPTION if attempt.kind is Kind.CODE_ERROR else attempt.kind
    return kind, attempt.place


def _overspent(tally: _Tally, rules: Rules) -> str:
    if tally.spent > rules.max_restarts:
        return f"max_restarts: {rules.max_restarts} is spent"
    if tally.recent > rules.failures:
        return (
            f"{tally.recent} failures within {format_duration(rules.within)}, and restart.window "
            f"allows {rules.failures}"
        )
    return ""


def _asked(failure: Failure, rules: Rules) -> tuple[Answer | None, str]:
    """What the job wants, and the key that says so: the most particular one counts."""
    text = "\n".join((failure.summary, failure.traceback, failure.tail))
    for key, answer in rules.on.items():
        if key.startswith("/") and re.search(key[1:-1], text, re.MULTILINE):
            return answer, key
    names = (str(failure.code), failure.kind.value)
    return next(((rules.on[name], name) for name in names if name in rules.on), (None, ""))


def _possible(answer: Answer, failure: Failure, rules: Rules) -> Answer:
    """`answer`, or what comes nearest to it here."""
    if answer is Answer.SMALLER and _impossible(answer, failure, rules):
        answer = Answer.REQUEUE
    if answer is Answer.REQUEUE and _impossible(answer, failure, rules):
        answer = Answer.RESTART
    return answer


def _impossible(answer: Answer, failure: Failure, rules: Rules) -> str:
    """Why `answer` cannot be given here, empty if it can."""
    if answer is Answer.SMALLER and not rules.can_shrink:
        return "the job cannot go on with less (guards.world_size)"
    if answer is Answer.SMALLER and failure.rank is None:
        return "it is not known which rank failed"
    if answer is Answer.REQUEUE and not rules.scheduler:
        return "no scheduler started this"
    return ""


def _right_after_one_checkpoint(history: Sequence[Ended]) -> bool:
    """Whether the same failure has come twice, and soon, after loading the same checkpoint."""
    errors = _errors(history)[-2:]
    if len(errors) < 2 or not errors[-1].place or not errors[-1].started_from:
        return False
    one = len({(_likeness(error), error.started_from) for error in errors}) == 1
    return one and all(0 <= error.furthest - error.started_from <= FEW for error in errors)


def _errors(history: Sequence[Ended]) -> list[Ended]:
    return [each for each in history if each.refused is None and not TRAITS[each.kind].free]


def _answer_refusal(history: Sequence[Ended], failure: Failure) -> Decision:
    """Once each: the gate learns from a refusal, so the same one again means that it did not."""
    *before, last = history
    if failure.final or any(attempt.refused == last.refused for attempt in before):
        return GiveUp(failure.summary, CheckpointError.exit_code, failure.hint)
    return RestartGroup(0.0, "the gate judges the checkpoints anew")


def _cool_down(stuck: int, failure: Failure, rules: Rules) -> Decision:
    """The breaker is open, or, if that takes no time, half open."""
    opened = stuck - rules.without_progress + 1
    if opened > rules.cool_downs:
        return _hopeless(stuck, failure)
    reason = (
        f"{_times(stuck)} without new progress: one try after a cool-down "
        f"({opened} of {rules.cool_downs})"
    )
    return RestartGroup(rules.cool_down, reason, "open" if rules.cool_down else "half-open")


def _hopeless(count: int, failure: Failure) -> GiveUp:
    reason = f"{_times(count)} in a row without new progress: {failure.summary}"
    return GiveUp(reason, AutoglmError.exit_code)


def _times(count: int) -> str:
    return "it died once" if count == 1 else f"it died {count} times"
