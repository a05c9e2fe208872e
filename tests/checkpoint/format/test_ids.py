from __future__ import annotations

from itertools import pairwise

import pytest

from autoglm_resume.checkpoint.format.ids import (
    attempt_of,
    checkpoint_id,
    is_id,
    newer,
    newest_first,
    step_of,
)


def test_ids_sort_by_step_then_attempt() -> None:
    names = [checkpoint_id(*i) for i in ((10, "a0"), (9, "a10"), (9, "a9"), (9, "f00d"))]
    assert newest_first(reversed(names)) == names
    assert all(newer(a, b) and not newer(b, a) for a, b in pairwise(names))
    assert not newer(names[0], names[0])


def test_an_id_says_at_which_step_it_was_saved_and_by_which_attempt() -> None:
    assert (step_of("step-0000000009.a10"), attempt_of("step-0000000009.a10")) == (9, 10)
    assert (step_of("step-0000000009.f00d"), attempt_of("step-0000000009.f00d")) == (9, -1)
    assert attempt_of("step-0000000009.a2xf00d") == 2, "by a script alone, after a run's own"
    assert attempt_of("step-0000000009.a2b") == -1
    assert step_of(checkpoint_id(10**17, "a0")) == 10**17


@pytest.mark.parametrize(
    "name", ["step-9.a1", "step-0000000009", "step-0000000009.A", "quarantine", ""]
)
def test_any_other_name_is_no_id(name: str) -> None:
    assert not is_id(name)
    for asked in (step_of, attempt_of):
        with pytest.raises(ValueError, match="is not a checkpoint id"):
            asked(name)


def test_no_id_is_made_of_what_is_no_step() -> None:
    with pytest.raises(ValueError, match="no checkpoint id"):
        checkpoint_id(-1, "a0")
