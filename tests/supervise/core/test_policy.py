from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.failures import Answer, Kind
from autoglm_resume.supervise.core import policy
from autoglm_resume.supervise.core.failure import Failure
from autoglm_resume.supervise.core.policy import (
    Decision,
    Ended,
    GiveUp,
    Pause,
    Requeue,
    RestartGroup,
    RollBack,
    Rules,
    Smaller,
    remaining,
)

NOW = 1_000_000.0
RULES = Rules(max_restarts=10, backoff=1.0, max_backoff=60.0, without_progress=3)
SCHEDULED = replace(RULES, scheduler=True)
ELASTIC = replace(RULES, can_shrink=True)
KILLED = Failure(Kind.KILLED, 1, "rank 1 died by SIGKILL", 30, signal=9)
FROM_START = Ended(0, 10, 0, kind=Kind.KILLED)
RAISED = Failure(Kind.EXCEPTION, 0, "rank 0 failed with ValueError", 5, place="train.py:3 in f")

DIES_AGAIN = [
    *(Kind.EXITED, Kind.EXCEPTION, Kind.CODE_ERROR, Kind.LAUNCH, Kind.CUDA_OOM, Kind.DATA_ERROR)
]
HEALS = [
    *(Kind.KILLED, Kind.CRASHED, Kind.HOST_OOM, Kind.COMMUNICATION, Kind.HANG, Kind.STRAGGLER),
    *(Kind.PORT, Kind.UNKNOWN),
]


def stuck(times: int, kind: Kind = Kind.KILLED, place: str = "") -> list[Ended]:
    """One attempt that reached step 10, then `times` that came no further."""
    each = replace(FROM_START, kind=kind, place=place)
    return [each] + [each] * times


def decide(
    history: Sequence[Ended], failure: Failure = KILLED, rules: Rules = RULES, jitter: float = 0.0
) -> Decision:
    return policy.decide(history, failure, rules, NOW, jitter)


def of(kind: Kind, **more: object) -> Failure:
    return replace(Failure(kind, 1, f"rank 1: {kind.value}", 10), **more)  # type: ignore[arg-type]


def shown(decision: Decision) -> str:
    """A decision in a word or two."""
    match decision:
        case GiveUp(code=code):
            return f"give up {code}"
        case RestartGroup(breaker="open"):
            return "cool down"
        case RollBack(before=None, delay=delay):
            return f"back in {delay:g}"
        case RollBack(before=before):
            return f"before {before}"
        case RestartGroup(delay=delay):
            return f"in {delay:g}"
        case Pause(until=until):
            return until
        case Smaller(rank=rank):
            return f"without {rank}"
        case Requeue():
            return "requeue"


# What each class gets: after progress, stuck once and twice, three, five and six times; after
# progress under a scheduler; after progress where it can shrink.
TABLE = {
    **dict.fromkeys(HEALS, ("in 0 in 1 in 2", "cool down", "cool down", "give up 1", "in 0 in 0")),
    **dict.fromkeys(
        DIES_AGAIN, ("in 0 in 1 in 2", "give up 1", "give up 1", "give up 1", "in 0 in 0")
    ),
    Kind.GPU_FAULT: (
        *("in 0 in 1 in 2", "cool down", "cool down", "give up 1", "requeue without 1"),
    ),
    Kind.DIVERGED: (
        *("back in 0 back in 1 back in 2", "give up 1", "give up 1", "give up 1"),
        "back in 0 back in 0",
    ),
    Kind.DISK_FULL: ("space space space", "cool down", "cool down", "give up 1", "space space"),
    Kind.STORAGE: (
        *("storage storage storage", "cool down", "cool down", "give up 1", "storage storage"),
    ),
    **dict.fromkeys(
        (Kind.PREEMPTED, Kind.STOPPED),
        ("in 0 in 1 in 2", "cool down", "cool down", "give up 1", "requeue in 0"),
    ),
    **{
        kind: (f"{end} {end} {end}", end, end, end, f"{end} {end}")
        for kind, end in ((Kind.NO_RESULT, "give up 1"), (Kind.USAGE_ERROR, "give up 2"))
    },
    Kind.REFUSED: ("in 0 in 0 in 0", "in 0", "in 0", "in 0", "in 0 in 0"),
}


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
def test_every_class_has_its_answers(kind: Kind) -> None:
    def answer(times: int, rules: Rules = RULES) -> str:
        history = stuck(times, kind)
        if kind is Kind.REFUSED:
            history[-1] = replace(history[-1], refused="a")
        return shown(decide(history, of(kind), rules))

    soon, third, fifth, sixth, else_where = TABLE[kind]
    assert " ".join(map(answer, range(3))) == soon
    assert (answer(3), answer(5), answer(6)) == (third, fifth, sixth)
    assert f"{answer(0, SCHEDULED)} {answer(0, ELASTIC)}" == else_where


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([FROM_START], "in 0"),
        ([Ended(0, -1, 0)], "in 1"),
        ([Ended(50, 50, 50)], "in 1"),
        ([Ended(50, 51, 50)], "in 0"),
        (stuck(1), "in 1"),
        (stuck(2), "in 2"),
        (stuck(3), "cool down"),
        ([*stuck(2), Ended(0, 11, 0)], "in 0"),
        ([*stuck(1), Ended(0, 11, 0), Ended(0, 11, 0)], "in 1"),
        (
            [Ended(0, 100, 90), Ended(90, 95, 90), Ended(50, 99, 90), Ended(50, 100, 90)],
            "cool down",
        ),
        ([Ended(0, step, 0) for step in range(1, 11)], "in 0"),
        ([Ended(0, step, 0) for step in range(1, 12)], "give up 1"),
        ([*[Ended(0, step, 0) for step in range(1, 12)], Ended(0, 19, 18)], "in 0"),
        ([Ended(0, -1, 0, lived=61.0)] * 9, "in 0"),
        ([Ended(0, -1, 0, lived=59.0)] * 2, "in 2"),
    ],
)
def test_progress_decides_how_soon(history: list[Ended], expected: str) -> None:
    assert shown(decide(history)) == expected


def test_reasons_are_sentences_with_what_happened() -> None:
    assert decide([FROM_START]).reason == "it had made progress"
    assert decide(stuck(1)).reason == "it died once without new progress"
    assert decide(stuck(4)).reason == (
        "it died 4 times without new progress: one try after a cool-down (2 of 3)"
    )
    assert decide(stuck(6)) == GiveUp(
        "it died 6 times in a row without new progress: rank 1 died by SIGKILL", 1
    )
    spent = [Ended(0, step, 0) for step in range(1, 12)]
    assert decide(spent) == GiveUp("max_restarts: 10 is spent: rank 1 died by SIGKILL", 1)


def test_new_checkpointed_steps_refill_the_budget() -> None:
    spent = [Ended(0, step, 0) for step in range(1, 11)]
    refilled = [*spent, Ended(0, 19, 18)]
    for step in range(20, 29):
        assert isinstance(decide(refilled), RestartGroup)
        refilled.append(Ended(18, step, 18))
    assert isinstance(decide(refilled), RestartGroup)
    assert isinstance(decide([*refilled, Ended(18, 29, 18)]), GiveUp)


@pytest.mark.parametrize("history", [[FROM_START], stuck(9), [Ended(0, 5, 5)]])
def test_a_rank_that_exits_93_is_not_run_again_whatever_is_left(history: list[Ended]) -> None:
    rules = replace(RULES, on={"exited": Answer.RESTART})
    failure = Failure(Kind.EXITED, 0, "rank 0 exited with code 93", 5, code=93)
    assert shown(decide(history, failure, rules)) == "give up 93"


def test_no_restarts_means_none() -> None:
    rules = Rules(max_restarts=0, backoff=0, max_backoff=0, without_progress=3)
    assert isinstance(decide([Ended(0, 99, 98)], KILLED, rules), GiveUp)


# Failures that are the same


def test_an_exception_that_wanders_is_given_time_to_heal() -> None:
    history = [replace(each, place=str(n)) for n, each in enumerate(stuck(3, Kind.EXCEPTION))]
    assert shown(decide(history, RAISED)) == "cool down"


def test_a_code_error_is_the_exception_it_was_the_first_time() -> None:
    place = RAISED.place
    history = [*stuck(1, Kind.EXCEPTION, place), *stuck(1, Kind.CODE_ERROR, place)]
    assert shown(decide(history, of(Kind.CODE_ERROR, place=place))) == "give up 1"


def test_the_same_failure_twice_right_after_a_checkpoint_goes_back_further() -> None:
    first = Ended(100, 103, 100, kind=Kind.EXCEPTION, place="train.py:3 in f")
    assert shown(decide([first], RAISED)) == "in 0"
    assert shown(decide([first, first], RAISED)) == "before 100"
    for other in (
        replace(first, started_from=90),
        replace(first, place="train.py:4 in f"),
        replace(first, place=""),
        replace(first, kind=Kind.HANG),
        replace(first, furthest=-1),
    ):
        assert shown(decide([first, other], RAISED)) == "in 1"
    far = replace(first, furthest=111)
    assert shown(decide([far, far], RAISED)) == "in 1"
    assert shown(decide([replace(first, started_from=0, furthest=3)] * 2, RAISED)) == "in 1"


# Rolling back


def test_each_roll_back_goes_further_back_whatever_was_saved_since() -> None:
    nan = of(Kind.DIVERGED)
    history = [Ended(0, 44, 40, kind=Kind.DIVERGED)]
    assert shown(decide(history, nan)) == "back in 0", "than the newest, in memory perhaps"
    history.append(Ended(30, 44, 40, kind=Kind.DIVERGED, action="roll_back"))
    assert shown(decide(history, nan)) == "before 30"
    history.append(Ended(20, 43, 40, kind=Kind.DIVERGED, action="roll_back"))
    assert shown(decide(history, nan)) == "before 20"
    history.append(Ended(10, 43, 40, kind=Kind.DIVERGED, action="roll_back"))
    assert shown(decide(history, nan)) == "give up 1"


# What the job maps

MAPPED = [
    ({"killed": Answer.STOP}, KILLED, "give up 1"),
    ({"hang": Answer.STOP}, KILLED, "in 0"),
    ({"killed": Answer.PAUSE}, KILLED, "space"),
    ({"killed": Answer.ROLL_BACK}, KILLED, "back in 0"),
    ({"killed": Answer.SMALLER}, KILLED, "without 1"),
    ({"killed": Answer.SMALLER}, replace(KILLED, rank=None), "requeue"),
    ({"killed": Answer.REQUEUE}, KILLED, "requeue"),
    ({"17": Answer.REQUEUE, "exited": Answer.STOP}, of(Kind.EXITED, code=17), "requeue"),
    ({"17": Answer.REQUEUE, "exited": Answer.STOP}, of(Kind.EXITED, code=18), "give up 1"),
    ({"exited": Answer.STOP, "/rank 1/": Answer.PAUSE}, of(Kind.EXITED, code=17), "space"),
    ({"/ECC error/": Answer.STOP}, replace(KILLED, tail="a\nan ECC error\nb"), "give up 1"),
    ({"/^ECC error$/": Answer.STOP}, replace(KILLED, tail="a\nECC error\nb"), "give up 1"),
    ({"/ECC error/": Answer.STOP}, replace(KILLED, traceback="ECC error"), "give up 1"),
    ({"diverged": Answer.RESTART}, of(Kind.DIVERGED), "in 0"),
    ({"preempted": Answer.STOP}, of(Kind.PREEMPTED), "give up 1"),
]


@pytest.mark.parametrize(("on", "failure", "expected"), MAPPED)
def test_the_job_may_answer_otherwise(
    on: dict[str, Answer], failure: Failure, expected: str
) -> None:
    rules = replace(RULES, on=on, scheduler=True, can_shrink=True)
    history = [replace(FROM_START, kind=failure.kind)]
    assert shown(decide(history, failure, rules)) == expected


def test_an_answer_of_the_jobs_own_is_bounded_like_any_other() -> None:
    def last(answer: Answer, times: int) -> str:
        rules = replace(RULES, on={"exception": answer}, scheduler=True)
        return shown(
            decide(stuck(times, Kind.EXCEPTION, "x"), of(Kind.EXCEPTION, place="x"), rules)
        )

    assert last(Answer.RESTART, 3) == "cool down", "the job says that it may heal"
    assert last(Answer.RESTART, 6) == "give up 1"
    assert last(Answer.PAUSE, 6) == "give up 1"
    assert last(Answer.ROLL_BACK, 3) == "give up 1"
    assert last(Answer.REQUEUE, 2) == "requeue"
    assert last(Answer.REQUEUE, 3) == "give up 1"


def test_a_stop_that_is_asked_for_names_the_key() -> None:
    rules = replace(RULES, on={"17": Answer.STOP})
    decision = decide([FROM_START], of(Kind.EXITED, code=17), rules)
    assert decision.reason == "restart.on has 17: stop: rank 1: exited"


@pytest.mark.parametrize(
    ("answer", "rank", "reason"),
    [
        (Answer.REQUEUE, 1, "no scheduler started this"),
        (Answer.SMALLER, 1, "the job cannot go on with less (guards.world_size)"),
        (Answer.SMALLER, None, "it is not known which rank failed"),
    ],
)
def test_an_answer_that_is_not_possible_here_is_not_replaced_in_silence(
    answer: Answer, rank: int | None, reason: str
) -> None:
    rules = replace(RULES, on={"17": answer}, can_shrink=rank is None)
    failure = replace(of(Kind.EXITED, code=17), rank=rank)
    note = f"restart.on has 17: {answer.value}, but {reason}"
    decision = decide([FROM_START], failure, rules)
    assert decision == RestartGroup(0.0, f"it had made progress; {note}")
    end = decide(stuck(9, Kind.EXITED), failure, rules)
    assert isinstance(end, GiveUp)
    assert end.reason.endswith(f"; {note}")
    assert decide([FROM_START], of(Kind.GPU_FAULT), RULES).reason == "it had made progress"


# Refusals

REFUSED = Failure(Kind.REFUSED, 0, "rank 0 refused", -1)


def refusal(id: str) -> Ended:
    return Ended(30, -1, 30, refused=id, kind=Kind.REFUSED)


def test_a_refused_checkpoint_is_answered_by_another_one_at_once() -> None:
    for count in range(1, 20):
        history = [refusal(str(id)) for id in range(count)]
        assert decide(history, REFUSED, jitter=0.9) == RestartGroup(
            0.0, "the gate judges the checkpoints anew"
        )


def test_a_refusal_that_the_gate_cannot_learn_from_is_not_asked_for_twice() -> None:
    assert decide([refusal("a")], replace(REFUSED, final=True)) == GiveUp("rank 0 refused", 90)


def test_a_checkpoint_that_is_refused_twice_ends_the_run() -> None:
    history = [refusal("a"), FROM_START, refusal("b"), refusal("a")]
    assert decide(history, REFUSED) == GiveUp("rank 0 refused", 90)


def test_refusals_spend_neither_budget() -> None:
    refusals = [refusal(str(id)) for id in range(9)]
    assert shown(decide([*refusals, Ended(10, 29, 30)])) == "in 1"


# Preemptions


def test_preemptions_and_requeues_spend_nothing() -> None:
    for free in (
        Ended(0, 10, 0, kind=Kind.PREEMPTED, time=NOW),
        Ended(0, 10, 0, kind=Kind.EXITED, action="requeue", time=NOW),
    ):
        rules = replace(SCHEDULED, failures=1)
        assert shown(decide([FROM_START, *[free] * 50, FROM_START], KILLED, rules)) == "in 1"
        preempted = [FROM_START, *[free] * 50, replace(FROM_START, kind=Kind.PREEMPTED)]
        assert shown(decide(preempted, of(Kind.PREEMPTED), rules)) == "requeue"


# The window and the clock


def test_more_failures_than_the_window_allows_end_the_run_whatever_progress_they_made() -> None:
    rules = replace(RULES, failures=3, within=100.0)

    def after(*ages: float) -> str:
        history = [Ended(n, n + 1, n + 1, time=NOW - age) for n, age in enumerate(ages)]
        return shown(decide(history, KILLED, rules))

    assert after(90, 60, 30, 0) == "give up 1"
    assert after(101, 60, 30, 0) == "in 0"
    assert after(-5000, 60, 30, 0) == "in 0", "the clock was set back"
    history = [Ended(n, n + 1, n + 1, time=NOW) for n in range(4)]
    assert "4 failures within 1m40s" in decide(history, KILLED, replace(rules)).reason


@given(delay=st.floats(0, 1e6), since=st.floats(-1e12, 1e12), now=st.floats(-1e12, 1e12))
def test_what_is_left_of_a_wait_is_never_negative_nor_longer_than_all_of_it(
    delay: float, since: float, now: float
) -> None:
    assert 0 <= remaining(delay, since, now) <= delay


def test_what_is_left_of_a_wait() -> None:
    assert remaining(300, NOW, NOW + 100) == 200
    assert remaining(300, NOW, NOW + 400) == 0
    assert remaining(300, NOW, NOW - 1e9) == 300


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
        assert isinstance(decision, RestartGroup)
        return decision.delay

    full = delay(times, 0.0)
    assert full <= delay(times + 1, 0.0) <= rules.max_backoff
    assert delay(1, 0.0) == backoff
    assert full / 2 <= delay(times, jitter) <= full
