from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autoglm_resume.job.units import parse_duration
from autoglm_resume.supervise.core import save_interval
from autoglm_resume.supervise.core.save_interval import choose

HOUR = 3600.0
DAY = 24 * HOUR


def test_the_first_save_comes_soon_because_it_shows_what_saves_cost() -> None:
    assert choose([], 0, 10.0).seconds == 5
    assert choose([], 0, 10.0).reason == "every 5s until a save has shown what it costs"


@pytest.mark.parametrize(
    ("cost", "failures", "elapsed", "nodes", "seconds"),
    [
        (0.5, 0, 0.0, 1, math.sqrt(2 * 0.5 * DAY)),
        (0.5, 0, 2 * DAY, 1, math.sqrt(2 * 0.5 * 3 * DAY)),
        (0.5, 3, 2 * DAY, 1, math.sqrt(2 * 0.5 * 3 * DAY / 4)),
        (0.5, 0, 0.0, 24, math.sqrt(2 * 0.5 * HOUR)),
    ],
)
def test_the_interval_is_that_of_young(
    cost: float, failures: int, elapsed: float, nodes: int, seconds: float
) -> None:
    assert choose([cost], failures, elapsed, nodes=nodes).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("costs", "failures", "elapsed", "writing", "reason"),
    [
        ([0.5], 0, 600.0, [], "every 4m55s: a save costs 500ms, no failure in 10m so far"),
        ([0.5], 1, 3 * HOUR, [], "every 3m40s: a save costs 500ms, 1 failure in 3h so far"),
        ([0.5], 2, 7500.0, [], "every 2m57s: a save costs 500ms, 2 failures in 2h5m so far"),
        (
            [0.0],
            0,
            5.0,
            [0.4],
            "every 1s: a save costs 0ms, no failure in 5s so far; 1s is the shortest",
        ),
        (
            [60.0],
            0,
            30 * DAY,
            [60.0],
            "every 1h: a save costs 1m, no failure in 30d so far; 1h is the longest",
        ),
        (
            [20.0],
            99,
            HOUR,
            [20.0],
            "every 3m20s: a save costs 20s, 99 failures in 1h so far; "
            "more saves would take more than 10%",
        ),
        (
            [0.05],
            0,
            HOUR,
            [50.0, 90.0, 100.0],
            "every 3m: a save costs 50ms, no failure in 1h so far; writing one takes 1m30s",
        ),
    ],
)
def test_the_reason_gives_the_numbers(
    costs: list[float], failures: int, elapsed: float, writing: list[float], reason: str
) -> None:
    assert choose(costs, failures, elapsed, writing=writing).reason == reason


def test_what_has_just_begun_may_fail_as_soon_again() -> None:
    begun = choose([0.1], 1, 3000.0, since=20.0)
    assert begun.seconds == pytest.approx(math.sqrt(2 * 0.1 * 20))
    assert begun.reason.endswith("1 failure in 50m so far, and it has only gone on for 20s")
    assert choose([0.1], 1, 3000.0, since=DAY) == choose([0.1], 1, 3000.0)


def test_one_slow_save_does_not_stretch_it() -> None:
    assert choose([40.0, 0.5, 0.5, 0.5], 0, 0.0) == choose([0.5], 0, 0.0)


def test_a_measurement_below_zero_counts_as_free() -> None:
    assert choose([-0.01], 0, 0.0).seconds == save_interval.SHORTEST


costs = st.lists(st.floats(-1.0, 1e4), min_size=1, max_size=9)
failures = st.integers(0, 10_000)
elapsed = st.floats(0.0, 1e8)


@given(costs, failures, elapsed, st.lists(st.floats(0.0, 1e4)), st.integers(1, 10_000))
def test_it_is_always_between_its_bounds_and_says_so_in_one_line(
    costs: list[float], failures: int, elapsed: float, writing: list[float], nodes: int
) -> None:
    chosen = choose(costs, failures, elapsed, writing=writing, nodes=nodes)
    cost, busy = sorted(costs)[len(costs) // 2], max(writing, default=0.0)
    assert save_interval.SHORTEST <= chosen.seconds <= max(3600.0, 10 * max(costs), 2 * busy)
    assert len(costs) % 2 == 0 or chosen.seconds >= 9.999 * cost
    said = parse_duration(chosen.reason.removeprefix("every ").partition(":")[0])
    assert said == pytest.approx(chosen.seconds, rel=0.06)
    assert "\n" not in chosen.reason


@given(costs, failures, elapsed)
def test_more_failures_never_make_it_longer_nor_more_time_without_any_shorter(
    costs: list[float], failures: int, elapsed: float
) -> None:
    chosen = choose(costs, failures, elapsed).seconds
    assert choose(costs, failures + 1, elapsed).seconds <= chosen
    assert choose(costs, failures, elapsed + HOUR).seconds >= chosen
