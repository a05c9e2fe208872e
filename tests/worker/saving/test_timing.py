"""When the copy of a save is trusted to a thread."""

from __future__ import annotations

from autoglm_resume.worker.saving.timing import PROOFS, CopyTiming


def test_a_loop_is_trusted_after_so_many_saves_that_nothing_changed() -> None:
    timing = CopyTiming()
    for _ in range(PROOFS):
        assert timing.at_once
        assert timing.watched
        timing = timing.after("")
    assert not timing.at_once
    assert not timing.watched


def test_a_loop_that_once_changed_something_is_never_trusted_again() -> None:
    for proofs in range(PROOFS + 3):
        timing = CopyTiming()
        for _ in range(proofs):
            timing = timing.after("")
        timing = timing.after("model/weight")
        for _ in range(PROOFS + 1):
            assert timing.at_once
            assert not timing.watched
            assert timing.changed == "model/weight"
            timing = timing.after("")
