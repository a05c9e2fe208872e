from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.supervise.liveness import Pace, agreed_step, hung
from autoglm_resume.worker.board import NEVER, Beat, Phase

SECOND = 10**9


def beat(phase: Phase, at: float, first: float = 0, step: int = 0) -> Beat:
    return Beat(1, phase, step, int(at * SECOND), int(first * SECOND))


@pytest.mark.parametrize(
    ("one", "now", "is_hung"),
    [
        (NEVER, 1e9, False),
        (beat(Phase.NONE, 0), 1e9, False),  # no session: nothing is owed
        (beat(Phase.START, 100), 190, False),
        (beat(Phase.START, 100), 191, True),
        (beat(Phase.FORWARD, 100), 190, False),  # still the first step: compilation takes time
        (beat(Phase.FORWARD, 100, first=50), 110, False),
        (beat(Phase.FORWARD, 100, first=50), 111, True),
        (beat(Phase.SAVE, 100, first=50), 190, False),  # nothing beats while a part is written
        (beat(Phase.SAVE, 100, first=50), 191, True),
        (beat(Phase.RESTORE, 100), 111, False),
        (beat(Phase.DONE, 100, first=50), 1e9, False),
    ],
)
def test_a_rank_is_hung_when_its_last_beat_is_too_old(one: Beat, now: float, is_hung: bool) -> None:
    fine = beat(Phase.FORWARD, now, first=1)
    assert hung([fine, one, fine], now, timeout=10, startup=90) == [1] * is_hung


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
    pace = Pace()
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
