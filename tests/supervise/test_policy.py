from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.kinds import Kind
from autoglm_resume.supervise.failure import Failure
from autoglm_resume.supervise.policy import Decision, Ended, GiveUp, Restart, Rules, decide

RULES = Rules(max_restarts=4, backoff=1.0, max_backoff=60.0, without_progress=3)
KILLED = Failure(Kind.KILLED, 1, "rank 1 died by SIGKILL", 30, signal=9)
FROM_START = Ended(0, 10, 0)


def stuck(times: int) -> list[Ended]:
    """One attempt that reached step 10, then `times` that came no further."""
    return [FROM_START] + [FROM_START] * times


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([FROM_START], Restart(0.0, "it had made progress")),
        ([Ended(0, -1, 0)], Restart(1.0, "it died once without new progress")),
        ([Ended(50, 50, 50)], Restart(1.0, "it died once without new progress")),
        ([Ended(50, 51, 50)], Restart(0.0, "it had made progress")),
        (stuck(1), Restart(1.0, "it died once without new progress")),
        (stuck(2), Restart(2.0, "it died 2 times without new progress")),
        (
            stuck(3),
            GiveUp("it died 3 times in a row without new progress: rank 1 died by SIGKILL", 1),
        ),
        ([*stuck(2), Ended(0, 11, 0)], Restart(0.0, "it had made progress")),
        ([*stuck(1), Ended(0, 11, 0), Ended(0, 11, 0)], Restart(1.0, "it died once without new")),
        (
            [Ended(0, step, 0) for step in range(1, 6)],
            GiveUp("max_restarts: 4 is spent: rank 1 died by SIGKILL", 1),
        ),
        ([Ended(0, step, 0) for step in range(1, 5)], Restart(0.0, "it had made progress")),
    ],
)
def test_a_failure_is_answered(history: list[Ended], expected: Decision) -> None:
    decision = decide(history, KILLED, RULES, jitter=0.0)
    assert type(decision) is type(expected)
    assert decision.reason.startswith(expected.reason)
    if isinstance(decision, Restart):
        assert isinstance(expected, Restart)
        assert decision.delay == expected.delay
    else:
        assert decision == expected


def test_new_checkpointed_steps_refill_the_budget() -> None:
    spent = [Ended(0, step, 0) for step in range(1, 5)]
    assert isinstance(decide([*spent, Ended(0, 9, 0)], KILLED, RULES, 0.0), GiveUp)
    refilled = [*spent, Ended(0, 9, 8)]
    for step in range(10, 13):
        assert isinstance(decide(refilled, KILLED, RULES, 0.0), Restart)
        refilled.append(Ended(8, step, 8))
    assert isinstance(decide(refilled, KILLED, RULES, 0.0), Restart)
    assert isinstance(decide([*refilled, Ended(8, 14, 8)], KILLED, RULES, 0.0), GiveUp)


def test_steps_that_were_run_before_are_no_progress_even_after_falling_back() -> None:
    history = [Ended(0, 100, 90), Ended(90, 95, 90), Ended(50, 99, 90), Ended(50, 100, 90)]
    assert isinstance(decide(history, KILLED, RULES, 0.0), GiveUp)


@pytest.mark.parametrize("history", [[FROM_START], stuck(9), [Ended(0, 5, 5)]])
def test_a_rank_that_exits_93_is_not_run_again_whatever_is_left(history: list[Ended]) -> None:
    failure = Failure(Kind.EXITED, 0, "rank 0 exited with code 93", 5, code=93)
    decision = decide(history, failure, RULES, 0.0)
    assert isinstance(decision, GiveUp)
    assert decision.code == 93


def test_no_restarts_means_none() -> None:
    rules = Rules(max_restarts=0, backoff=0, max_backoff=0, without_progress=3)
    assert isinstance(decide([Ended(0, 99, 98)], KILLED, rules, 0.0), GiveUp)


REFUSED = Failure(Kind.REFUSED, 0, "rank 0 refused", -1)


def refusal(id: str) -> Ended:
    return Ended(30, -1, 30, refused=id)


def test_a_refused_checkpoint_is_answered_by_another_one_at_once() -> None:
    for count in range(1, 20):
        history = [refusal(str(id)) for id in range(count)]
        assert decide(history, REFUSED, RULES, 0.9) == Restart(
            0.0, "the gate judges the checkpoints anew"
        )


def test_a_refusal_that_the_gate_cannot_learn_from_is_not_asked_for_twice() -> None:
    final = replace(REFUSED, final=True)
    assert decide([refusal("a")], final, RULES, 0.0) == GiveUp("rank 0 refused", 90)


def test_a_checkpoint_that_is_refused_twice_ends_the_run() -> None:
    history = [refusal("a"), FROM_START, refusal("b"), refusal("a")]
    assert decide(history, REFUSED, RULES, 0.0) == GiveUp("rank 0 refused", 90)


def test_refusals_spend_neither_budget() -> None:
    refusals = [refusal(str(id)) for id in range(9)]
    first = decide([*refusals, Ended(10, 29, 30)], KILLED, RULES, 0.0)
    assert first == Restart(1.0, "it died once without new progress")


@given(
    times=st.integers(1, 60),
    jitter=st.floats(0, 1, exclude_max=True),
    backoff=st.floats(0, 100),
    longest=st.floats(0, 1000),
)
def test_delays_grow_never_beyond_the_longest_and_jitter_takes_at_most_half(
    times: int, jitter: float, backoff: float, longest: float
) -> None:
    rules = Rules(1000, backoff, max(backoff, longest), 1000)

    def delay(stuck_for: int, jitter: float) -> float:
        decision = decide(stuck(stuck_for), KILLED, rules, jitter)
        assert isinstance(decision, Restart)
        return decision.delay

    full = delay(times, 0.0)
    assert full <= delay(times + 1, 0.0) <= rules.max_backoff
    assert delay(1, 0.0) == backoff
    assert full / 2 <= delay(times, jitter) <= full


@dataclass
class World:
    """A run under any sequence of failures, as the supervisor keeps its history."""

    rules: Rules
    history: list[Ended] = field(default_factory=list)
    furthest: int = 0
    checkpointed: int = 0

    def fail(self, ran: int, saved: bool) -> Decision:
        """An attempt from the newest checkpoint that runs `ran` steps, and perhaps saves."""
        start = self.checkpointed
        step = start + ran
        if saved and ran:
            self.checkpointed = step
        self.history.append(Ended(start, step if ran else -1, self.checkpointed))
        return decide(self.history, KILLED, self.rules, 0.5)


@given(
    rules=st.builds(
        Rules,
        max_restarts=st.integers(0, 5),
        backoff=st.just(1.0),
        max_backoff=st.just(8.0),
        without_progress=st.integers(1, 4),
    ),
    attempts=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40),
)
def test_budgets_hold_for_every_history(rules: Rules, attempts: list[tuple[int, bool]]) -> None:
    world = World(rules)
    since_checkpoint = without_progress = furthest = 0
    for ran, saved in attempts:
        before = world.checkpointed
        decision = world.fail(ran, saved)
        reached = world.history[-1].furthest
        without_progress = 0 if reached > furthest else without_progress + 1
        furthest = max(furthest, reached)
        if world.checkpointed > before:
            since_checkpoint = 0
        if isinstance(decision, Restart):
            since_checkpoint += 1
            assert since_checkpoint <= rules.max_restarts
            assert without_progress < rules.without_progress
            assert (decision.delay == 0) == (without_progress == 0)
        else:
            assert decision.code == 1
            # It gives up for a reason, never earlier.
            assert (
                without_progress >= rules.without_progress or since_checkpoint >= rules.max_restarts
            )
            return
