from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.errors import LossDiverged
from autoglm_resume.protocol.loss_guard import Bounds, LossGuard

NAN, INF = math.nan, math.inf
BOUNDS = Bounds(nan=3, spike=10)
USUAL = [2.0] * 20


def verdict(bounds: Bounds, losses: list[float]) -> int | None:
    """How many losses it took, None if all passed."""
    guard = LossGuard(bounds)
    for number, loss in enumerate(losses, 1):
        try:
            guard.see(loss)
        except LossDiverged:
            return number
    return None


@pytest.mark.parametrize(
    ("bounds", "losses", "after"),
    [
        (BOUNDS, [NAN, INF, -INF], 3),
        (BOUNDS, [NAN, NAN, 1.0, NAN, NAN, 1.0], None),  # a loss scaler skips such steps
        (Bounds(), [NAN] * 100, None),
        (Bounds(nan=1), [1.0, NAN], 2),
        (BOUNDS, [*USUAL, 21.0, 21.0, 21.0], 23),
        (BOUNDS, [*USUAL, 21.0, 21.0, 2.0, 21.0, 21.0], None),
        (BOUNDS, [*USUAL, 19.0, 19.0, 19.0], None),
        (BOUNDS, [2.0, 21.0, 21.0, 21.0], None),  # too little is known
        (Bounds(nan=3), [*USUAL, 21.0, 21.0, 21.0], None),
        (BOUNDS, [*([-2.0] * 20), 5.0, 5.0, 5.0], None),  # no ratio to a negative median
    ],
)
def test_a_loss_that_is_lost_for_good_ends_the_attempt(
    bounds: Bounds, losses: list[float], after: int | None
) -> None:
    assert verdict(bounds, losses) == after


@given(st.lists(st.floats(1.0, 5.0), max_size=300))
def test_losses_within_reason_never_do(losses: list[float]) -> None:
    assert verdict(BOUNDS, losses) is None


def test_it_says_what_the_loss_was_and_where_to_change_the_bound() -> None:
    guard = LossGuard(Bounds(nan=1))
    with pytest.raises(LossDiverged, match="the loss was nan in one report") as caught:
        guard.see(NAN)
    assert "guards.nan_losses" in caught.value.hint
