"""What to do after a failure. Pure: the history goes in, a decision comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume.errors import AutoglmError, CheckpointError, DoNotRequeue
from autoglm_resume.kinds import Kind
from autoglm_resume.supervise.failure import Failure


@dataclass(frozen=True)
class Rules:
    """The job's `restart`; times in seconds."""

    max_restarts: int
    backoff: float
    max_backoff: float
    without_progress: int


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


@dataclass(frozen=True)
class Restart:
    """Start the group again after `delay` seconds."""

    delay: float
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """End the run with exit code `code`."""

    reason: str
    code: int


Decision = Restart | GiveUp


def decide(history: Sequence[Ended], failure: Failure, rules: Rules, jitter: float) -> Decision:
    """Answer the last failure in `history` (oldest first, that one included).

    New checkpointed steps refill the budget of `max_restarts`. Attempts in a row that come no
    further than the run had come before end it early, however much is left: it would die the same
    way again. The first restart after progress is immediate; then the delay doubles, and
    `jitter`, in [0, 1), takes up to half of it off so that many runs do not return at once.
    """
    if failure.code == DoNotRequeue.exit_code:
        return GiveUp("the job asked not to be run again (exit code 93)", DoNotRequeue.exit_code)
    if failure.kind is Kind.REFUSED:
        return _answer_refusal(history, failure)
    stuck, spent = _tally(history, rules.max_backoff)
    if stuck >= rules.without_progress:
        return GiveUp(
            f"{_times(stuck)} in a row without new progress: {failure.summary}",
            AutoglmError.exit_code,
        )
    if spent > rules.max_restarts:
        return GiveUp(
            f"max_restarts: {rules.max_restarts} is spent: {failure.summary}",
            AutoglmError.exit_code,
        )
    if stuck == 0:
        return Restart(0.0, "it had made progress")
    delay = min(rules.max_backoff, rules.backoff * 2.0 ** (stuck - 1)) * (1 - jitter / 2)
    return Restart(delay, f"{_times(stuck)} without new progress")


def _answer_refusal(history: Sequence[Ended], failure: Failure) -> Decision:
    """Once each: the gate learns from a refusal, so the same one again means that it did not."""
    *before, last = history
    if failure.final or any(attempt.refused == last.refused for attempt in before):
        return GiveUp(failure.summary, CheckpointError.exit_code)
    return Restart(0.0, "the gate judges the checkpoints anew")


def _tally(history: Sequence[Ended], long: float) -> tuple[int, int]:
    """Attempts in a row that came no further, and restarts spent since the last new checkpoint.

    Of a script without a session nothing is known but how long it ran: more than `long` seconds
    count as progress.
    """
    stuck = spent = 0
    furthest = checkpointed = history[0].started_from if history else 0
    for attempt in history:
        if attempt.refused is not None:
            continue  # it never ran
        silent = attempt.lived is not None and attempt.lived > long
        stuck = 0 if silent or attempt.furthest > furthest else stuck + 1
        spent = 1 if silent or attempt.checkpointed > checkpointed else spent + 1
        furthest = max(furthest, attempt.furthest)
        checkpointed = max(checkpointed, attempt.checkpointed)
    return stuck, spent


def _times(count: int) -> str:
    return "it died once" if count == 1 else f"it died {count} times"
