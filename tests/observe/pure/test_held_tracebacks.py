from __future__ import annotations

import pytest

from autoglm_resume.observe.pure.held_tracebacks import MOST, PATIENCE, HeldTracebacks, Lines

TRACE = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    open("x")
FileNotFoundError: x

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 5, in <module>
    raise ValueError("two\\nlines")
ValueError: two
lines"""


def held(text: str, ranks: tuple[int, ...] = (0,)) -> HeldTracebacks:
    found = HeldTracebacks()
    for rank in ranks:
        for line in text.splitlines():
            assert found.take(rank, line, 0.0) == []
    return found


def lines(text: str, rank: int = 0) -> Lines:
    return [(rank, line) for line in text.splitlines()]


def test_what_is_no_traceback_is_shown_at_once() -> None:
    assert HeldTracebacks().take(1, "loss 2.5", 0.0) == [(1, "loss 2.5")]


def test_a_script_that_goes_on_has_its_traceback_shown_whole_a_moment_later() -> None:
    found = held(TRACE)
    assert found.take(1, "another rank", 0.1) == [(1, "another rank")]
    assert found.due(PATIENCE) == []
    assert found.take(0, "goes on", 2 * PATIENCE) == [*lines(TRACE), (0, "goes on")]
    assert found.take(0, "further", 2 * PATIENCE) == [(0, "further")]


def test_one_that_prints_a_lot_is_not_held_for_long() -> None:
    found = held(TRACE)
    shown = [line for n in range(MOST) for line in found.take(0, f"line {n}", 0.0)]
    assert len(shown) == len(TRACE.splitlines()) + MOST


def test_what_ended_the_attempt_is_left_out_in_all_ranks_and_nothing_else_is() -> None:
    found = held(TRACE + "\nsaved what there was", ranks=(0, 3))
    left, raised = found.without(TRACE)
    assert left == [(0, "saved what there was"), (3, "saved what there was")]
    assert raised == [0, 3]
    assert found.all() == []


@pytest.mark.parametrize("mark", ["[rank2]: ", "[rank2]:"])
def test_the_marks_that_torch_adds_make_it_no_other_one(mark: str) -> None:
    marked = "\n".join(f"{mark}{line}" for line in TRACE.splitlines())
    assert held(marked).without(TRACE) == ([], [0])
