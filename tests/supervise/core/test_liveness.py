from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_resume.protocol import silences
from autoglm_resume.protocol.heartbeats import NEVER, Beat, Phase
from autoglm_resume.protocol.silences import Counts
from autoglm_resume.supervise.core.liveness import (
    Limits,
    Look,
    StepRate,
    agreed_step,
    expected,
    health,
    hung,
    patience,
    waiting,
    without_longest,
)
from tests.thorough import thorough

SECOND = 10**9
LIMITS = Limits(timeout=300.0, startup=900.0)
TENTH = {silences.bucket(SECOND // 10): 1000}
"""A thousand silences of a tenth of a second."""
STEP = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.STEPPED)
USUAL = {int(phase): TENTH for phase in STEP}
HOOKLESS = {int(phase): TENTH for phase in STEP[:3]}
"""Of a script whose optimizer has no hooks: evaluation comes in what is told as backward."""


def beat(phase: Phase, at: float, first: float = 1, step: int = 5) -> Beat:
    return Beat(1, phase, step, int(at * SECOND), int(first * SECOND))


def look(
    phase: Phase,
    at: float = 100,
    first: float = 1,
    step: int = 5,
    silences: Mapping[int, Counts] = USUAL,
    **known: Any,
) -> Look:
    return Look(beat(phase, at, first, step), silences, **known)


UNKNOWN: Mapping[int, Counts] = {}
PAUSED = {**USUAL, int(Phase.DATA): {**TENTH, silences.bucket(20 * SECOND): 1}}


@pytest.mark.parametrize(
    ("one", "least", "most"),
    [
        # It does nothing, for longer than ever before in this phase.
        (look(Phase.FORWARD, idle=True), 30, 30),
        (look(Phase.DATA, idle=True), 30, 30),
        (look(Phase.DATA, idle=True, silences=PAUSED), 160, 300),
        (look(Phase.DATA, idle=True, silences=PAUSED, waited=1), 30, 30),
        (look(Phase.FORWARD, idle=True, silences=UNKNOWN), 300, 300),
        # It computes: it may compile, evaluate, or wait for a GPU.
        (look(Phase.FORWARD), 300, 300),
        (look(Phase.EVALUATE), 300, 300),
        (look(Phase.STEPPED), 300, 300),
        # Starts, and large saves, idle or not.
        (look(Phase.START, first=0, idle=True), 900, 900),
        (look(Phase.FORWARD, first=0), 900, 900),
        (look(Phase.RESTORE, first=0, idle=True), 900, 900),
        (look(Phase.SAVE, idle=True), 900, 900),
        # After the last step: an export, or nothing at all.
        (look(Phase.DONE), math.inf, math.inf),
        (look(Phase.DONE, idle=True), 900, 900),
        # A stopped process is.
        (look(Phase.DATA, stopped=True), 1, 1),
        (look(Phase.START, first=0, stopped=True), 1, 1),
    ],
)
def test_patience_is_what_this_run_taught_within_the_limits_of_the_job(
    one: Look, least: float, most: float
) -> None:
    assert least <= patience(one, LIMITS) <= most
    now = one.beat.time / SECOND
    assert hung({0: one}, now + min(least, 1e6) * 0.99, LIMITS) == []
    if most < math.inf:
        assert hung({0: one}, now + most * 1.01, LIMITS) == [0]
        assert patience(one, Limits(0.5, 0.5)) <= 0.5


STUCK: dict[str, Any] = {"idle": True}


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        # Who waits in a collective for another is not the suspect.
        ([look(Phase.BACKWARD, **STUCK), look(Phase.FORWARD, **STUCK)], [1]),
        ([look(Phase.FORWARD, step=6, **STUCK), look(Phase.OPTIMIZER, step=5, **STUCK)], [1]),
        ([look(Phase.FORWARD, step=6, **STUCK), look(Phase.STEPPED, step=5)], []),  # evaluates
        ([look(Phase.BACKWARD, step=6, **STUCK), look(Phase.BACKWARD, step=5, **STUCK)], [1]),
        ([look(Phase.BACKWARD, **STUCK), look(Phase.DATA, stopped=True)], [1]),
        # One computes between steps or saves, and may: nobody hangs.
        ([look(Phase.BACKWARD, **STUCK), look(Phase.DATA)], []),
        ([look(Phase.BACKWARD, **STUCK), look(Phase.SAVE, **STUCK)], []),
        # A collective that all are in, and that never ends.
        ([look(Phase.BACKWARD, **STUCK), look(Phase.BACKWARD, **STUCK)], [0, 1]),
        ([look(Phase.BACKWARD), look(Phase.BACKWARD, **STUCK)], [0, 1]),
        # A rank that waits may itself be stopped.
        ([look(Phase.BACKWARD, stopped=True), look(Phase.DATA)], [0]),
        # A rank that is done is in nobody's way.
        ([look(Phase.DONE, step=9), look(Phase.FORWARD, **STUCK)], [1]),
        # Without a session nothing is owed; beside ranks with one it is.
        ([look(Phase.NONE, step=-1), look(Phase.NONE, step=-1)], []),
        ([Look(NEVER, {}), Look(NEVER, {})], []),
        ([], []),
    ],
)
def test_the_suspect_is_the_one_that_did_not_arrive(looks: list[Look], expected: list[int]) -> None:
    assert hung(dict(enumerate(looks)), 140.0, LIMITS) == expected


def test_a_rank_that_never_begins_its_session_while_others_wait_is_late_at_start_up() -> None:
    looks = {
        0: look(Phase.START, first=0, step=-1),
        1: look(Phase.NONE, first=0, step=-1),
    }
    assert hung(looks, 100 + 899, LIMITS) == []
    assert 1 in hung(looks, 100 + 901, LIMITS)


def test_a_rank_that_does_nothing_after_its_last_step_hangs_whatever_others_do() -> None:
    looks = {0: look(Phase.DONE, step=9, idle=True), 1: look(Phase.DATA, at=1000)}
    assert hung(looks, 1001, LIMITS) == [0]


def test_those_that_are_ahead_wait_and_those_that_are_done_do_not() -> None:
    looks = {0: look(Phase.BACKWARD), 1: look(Phase.DATA), 2: look(Phase.DONE, step=9)}
    assert waiting(looks) == [0]
    assert waiting({0: look(Phase.NONE, step=-1), 1: look(Phase.NONE, step=-1)}) == []


@given(st.floats(1e-3, 10.0), st.floats(0.01, 1.0), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_no_silence_of_a_distribution_comes_near_what_is_expected_of_it(
    median: float, sigma: float, seed: int
) -> None:
    order = random.Random(seed)
    counts: Counts = {}
    for _ in range(500):
        at = silences.bucket(int(order.lognormvariate(math.log(median), sigma) * SECOND))
        counts[at] = counts.get(at, 0) + 1
    bound = expected(counts)
    later = [order.lognormvariate(math.log(median), sigma) for _ in range(2000)]
    assert max(later) < bound
    assert bound < 100 * median * math.exp(9 * sigma)  # and it is no excuse for everything


def test_too_few_silences_tell_nothing() -> None:
    few = {60: 19}
    assert expected(few) == math.inf
    assert expected({60: 30}, waited=15) == math.inf


@given(st.dictionaries(st.integers(0, 100), st.integers(1, 50)), st.integers(0, 3000))
def test_leaving_out_the_longest_leaves_out_so_many_and_no_shorter_one_before_a_longer(
    counts: dict[int, int], number: int
) -> None:
    left = without_longest(counts, number)
    assert sum(left.values()) == max(0, sum(counts.values()) - number)
    if left:
        assert all(counts[at] == left[at] for at in left if at < max(left))


@pytest.mark.parametrize(
    ("phase", "silent", "score"),
    [
        (Phase.FORWARD, 0.9, 1.0),
        (Phase.DATA, 150, 0.5),
        (Phase.DATA, 400, 0.0),
        (Phase.DONE, 9, 1),
    ],
)
def test_health_goes_from_one_to_nothing_as_patience_runs_out(
    phase: Phase, silent: float, score: float
) -> None:
    assert health(look(phase), 100 + silent, LIMITS) == pytest.approx(score)
    assert health(look(phase), 100 + silent, LIMITS, load=4.0) >= score


class Simulated:
    """A rank with steps of 50 ms and log-normal jitter, on a clock of its own."""

    def __init__(self, seed: int, sigma: float) -> None:
        self.order, self.sigma, self.now = random.Random(seed), sigma, 1.0
        self.silences: dict[int, Counts] = {}
        self.beat = beat(Phase.DATA, 1.0)

    def silent(self, phase: Phase, median: float) -> Iterator[tuple[float, float]]:
        """The silence as (begin, end), counted when it is over."""
        begin = self.now
        self.now += self.order.lognormvariate(math.log(median), self.sigma)
        yield begin, self.now
        counts = self.silences.setdefault(int(phase), {})
        at = silences.bucket(int((self.now - begin) * SECOND))
        counts[at] = counts.get(at, 0) + 1

    def life(self, seconds: float) -> Iterator[tuple[Phase, float, float]]:
        step = 0
        while self.now < seconds:
            step += 1
            plan = [(Phase.DATA, 0.005), (Phase.FORWARD, 0.015), (Phase.BACKWARD, 0.03)]
            plan += [(Phase.OPTIMIZER, 0.004), (Phase.STEPPED, 0.001)]
            if step % 2000 == 0:
                plan.append((Phase.STEPPED, 9.0))  # an evaluation of which no beat tells
            if step % 900 == 0:
                plan.append((Phase.SAVE, 8.0))
            if step % 1500 == 0:
                plan += [(Phase.EVALUATE, 0.08)] * 200
            for phase, median in plan:
                for begin, end in self.silent(phase, median):
                    yield phase, begin, end


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [1, *thorough(2)])
def test_thirty_minutes_of_jitter_evaluation_and_saves_raise_no_alarm_and_a_stop_is_seen_in_2_s(
    sigma: float, seed: int
) -> None:
    rank = Simulated(seed, sigma)
    for phase, begin, end in rank.life(1800):
        one = look(phase, at=begin, silences=rank.silences, idle=True)
        assert hung({0: one}, end, LIMITS) == [], (phase, end - begin)
    for phase in (Phase.DATA, Phase.FORWARD, Phase.BACKWARD):
        one = look(phase, at=rank.now, silences=rank.silences, stopped=True)
        assert hung({0: one}, rank.now + 1.75, LIMITS) == [0]


@given(
    st.lists(st.integers(-1, 10_000), min_size=1, max_size=8),
    st.just(0.0) | st.floats(1e-6, 100),
)
def test_an_agreed_step_lies_ahead_of_every_rank(steps: list[int], step_seconds: float) -> None:
    beats = [Beat(step=step) for step in steps]
    agreed = agreed_step(beats, step_seconds)
    assert agreed >= max(steps) + 2
    # At that pace the furthest rank gets there no sooner than the announcement needs.
    if step_seconds:
        assert (agreed - max(steps)) * step_seconds >= 0.25 - 1e-9
        assert (agreed - max(steps) - 3) * step_seconds <= 0.25 + 1e-9


def test_a_pace_is_that_of_the_last_looks_that_differed() -> None:
    pace = StepRate()
    assert (pace.rate, pace.seconds) == (0.0, 0.0)
    pace.see(10, 100.0)
    assert pace.rate == 0.0
    pace.see(10, 101.0)
    pace.see(14, 102.0)
    assert (pace.seconds, pace.rate) == (0.5, 2.0)
    pace.see(14, 200.0)
    assert pace.rate == 2.0
    pace.see(3, 300.0)  # never backwards
    assert pace.step == 14
