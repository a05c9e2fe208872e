"""What a save takes from training."""

from __future__ import annotations

import pytest

from autoglm_resume.worker.saving.cost import LEAST, StepTimes


def after(times: StepTimes, steps: list[tuple[float, bool]]) -> list[float | None]:
    """What each step says; of each, its seconds and whether a save is still under way after it."""
    now, said = 0.0, []
    for seconds, busy in steps:
        now += seconds
        said.append(times.step(now, busy=busy))
    return said


CALM = [(1.0, False)] * (LEAST + 1)


def test_a_save_costs_what_its_steps_take_longer_than_others() -> None:
    times = StepTimes()
    after(times, CALM)
    now = float(LEAST + 1)
    assert times.begin() is None
    assert times.step(now + 1.5, busy=True) is None
    assert times.step(now + 2.6, busy=False) is None
    assert times.step(now + 3.6, busy=False) == pytest.approx(0.6)
    assert times.step(now + 4.6, busy=False) is None


def test_saves_one_after_the_other_are_told_apart() -> None:
    times = StepTimes()
    after(times, CALM)
    now = float(LEAST + 1)
    times.begin()
    times.step(now + 1.5, busy=False)
    assert times.begin() == pytest.approx(0.5)
    times.step(now + 2.75, busy=False)
    assert times.begin() == pytest.approx(0.25)


def test_nothing_is_said_before_it_is_known_what_a_step_takes() -> None:
    times = StepTimes()
    after(times, CALM[:2])
    times.begin()
    assert after(times, [(9.0, False), (9.0, False)]) == [None, None]
