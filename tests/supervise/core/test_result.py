"""Whether the result that a run was to have is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.failures import Kind
from autoglm_resume.supervise.core import policy
from autoglm_resume.supervise.core.result import missing

FULL = "/x/rank-00000.pack: not saved: No space left on device; it needs 9 bytes, 0 are free there"
STEPS = st.integers(min_value=0, max_value=30)


@given(began=STEPS, more=STEPS, asked=st.none() | STEPS)
def test_nothing_is_missing_where_the_last_step_was_saved_and_no_fewer_were_asked_for(
    began: int, more: int, asked: int | None
) -> None:
    step = began + more
    fewer = asked is not None and asked < began and more == 0
    assert (missing(began, step, step, asked) is None) is not fewer


def test_a_script_without_a_session_is_asked_for_nothing() -> None:
    assert missing(0, -1, 0) is None


@pytest.mark.parametrize(
    ("unsaved", "kind"),
    [("", Kind.NO_RESULT), (FULL, Kind.DISK_FULL), ("the saver died", Kind.NO_RESULT)],
)
def test_what_kept_the_last_save_from_being_made_is_the_class_of_the_failure(
    unsaved: str, kind: Kind
) -> None:
    failure = missing(5, 13, 10, 13, unsaved)
    assert failure is not None
    assert failure.kind is kind
    assert "steps 11 to 13 are in no checkpoint" in failure.summary
    assert unsaved in failure.summary


def test_a_script_that_forgets_to_save_would_do_so_again() -> None:
    failure = missing(0, 1, 0)
    assert failure is not None
    assert "step 1 is in no checkpoint" in failure.summary
    ended = policy.Ended(0, 1, 0, kind=failure.kind)
    decision = policy.decide([ended], failure, policy.Rules(10, 1.0, 9.0, 3), 0.0, 0.0)
    assert decision == policy.GiveUp(failure.summary, 1)
