from __future__ import annotations

import pytest

from autoglm_resume.protocol.heartbeats import Phase
from autoglm_resume.supervise.core.stragglers import WINDOW, Stragglers, stragglers


def spent(own: float, waiting: float) -> dict[int, float]:
    return {int(Phase.FORWARD): own, int(Phase.BACKWARD): waiting}


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        ([spent(1, 9), spent(1, 9)], []),
        ([spent(2, 1), spent(9, 1)], [1]),
        ([spent(4, 9), spent(4, 9), spent(8, 5), spent(4, 9)], [2]),
        ([spent(0.01, 9), spent(0.1, 9)], []),  # ten times slower at next to nothing
        ([spent(4, 9)], []),
        ([], []),
    ],
)
def test_a_straggler_is_slow_at_its_own_work_by_a_part_of_a_step_that_counts(
    ranks: list[dict[int, float]], slow: list[int]
) -> None:
    assert list(stragglers(ranks, 100)) == slow
    assert stragglers(ranks, 0) == {}


def test_a_slow_rank_is_told_once() -> None:
    found = Stragglers()
    assert found.look(0.0, 1, [spent(0, 0), spent(0, 0)]) == {}
    assert found.look(WINDOW - 1, 100, [spent(1, 3), spent(3, 1)]) == {}  # too soon
    assert found.look(WINDOW + 1, 101, [spent(1, 3), spent(3, 1)]) == {1: pytest.approx(3.0)}
    assert found.look(2 * WINDOW + 2, 201, [spent(2, 6), spent(6, 2)]) == {}
    assert list(found.slow) == [1]


def test_a_few_steps_in_a_long_time_tell_nothing() -> None:
    found = Stragglers()
    found.look(0.0, 1, [spent(0, 0), spent(0, 0)])
    assert found.look(10 * WINDOW, 15, [spent(1, 3), spent(3, 1)]) == {}
