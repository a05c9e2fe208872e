from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from autoglm_resume.checkpoint.retention import doomed

COMMITTED = [(f"c{step}", step) for step in (5, 4, 3, 2, 1)]


def test_the_oldest_go_first() -> None:
    assert doomed(COMMITTED, 2, frozenset()) == ["c1", "c2", "c3"]


@given(st.integers(-3, 9), st.frozensets(st.sampled_from([name for name, _ in COMMITTED])))
def test_the_newest_and_the_protected_always_stay(keep: int, protected: frozenset[str]) -> None:
    gone = doomed(COMMITTED, keep, protected)
    assert "c5" not in gone
    assert not protected & set(gone)
    assert len(COMMITTED) - len(gone) >= min(max(keep, 1), len(COMMITTED))


def test_nothing_goes_when_there_is_nothing() -> None:
    assert doomed([], 1, frozenset()) == []
