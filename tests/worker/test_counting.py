"""Steps are counted over the whole run, from 0, and each is done once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from tests.worker.alone import end_process, lonely
from tests.worker.test_session import Training


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


def counted(numbers: list[int], start: int = 0) -> None:
    training = Training()
    assert training.session.resume() == start
    batches = iter(training.sampler)
    for step in numbers:
        training.step(next(batches))
        training.session.step_done(step)


def test_steps_that_go_back_are_refused() -> None:
    with pytest.raises(UsageError, match=r"step_done\(1\): step 2 is complete already"):
        counted([0, 1, 2, 1])
    with pytest.raises(UsageError, match=r"step_done\(0\): step 0 is complete already"):
        counted([0, 0])


def test_a_loop_that_counts_from_1_is_told_so_and_refused_once_that_leaves_a_step_out(
    capfd: pytest.CaptureFixture[str],
) -> None:
    counted([1, 2, 3])
    assert capfd.readouterr().err.count("step 0 was never done: steps are counted from 0") == 1
    end_process()
    with pytest.raises(UsageError, match="step 4 was never done"):
        counted([5, 6], start=4)
    end_process()
    counted([4, 5, 6], start=4)


@pytest.mark.parametrize("numbers", [[1, 3, 5], [0, 2, 3], [0, 1, 2], [3, 7], [1]])
def test_steps_that_are_left_out_on_purpose_are_nothing_to_tell(
    numbers: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    counted(numbers)
    assert "never done" not in capfd.readouterr().err


def test_a_second_session_with_the_checkpoints_of_the_first_does_not_pass_for_trained() -> None:
    def swept(directory: str) -> None:
        training = Training(checkpoint_dir=directory)
        batches = iter(training.sampler)
        for _ in training.session.steps(4):
            training.step(next(batches))

    swept("ckpt")
    with pytest.raises(UsageError, match="made by an earlier session of this process"):
        swept("ckpt")
    swept("other")
