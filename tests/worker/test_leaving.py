"""How a script leaves the loop over its steps, and what is saved then: alone, one process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from tests.worker.alone import checkpoints, end_process, lonely


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Training:
    """A parameter that every step makes larger by one, by an optimizer or without."""

    def __init__(self, *, by_hand: bool = False, **options: Any) -> None:
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.by_hand = by_hand
        self.session = autoglm.init(checkpoint_dir="ckpt", **options)
        self.session.track(model=self.model, optimizer=self.optimizer)

    def step(self) -> None:
        if self.by_hand:
            self.model.bias.data += 1
        else:
            self.model.bias.grad = torch.tensor([-1.0])
            self.optimizer.step()

    def steps(self, total: int = 9) -> Iterator[int]:
        return self.session.steps(total)


def saved() -> tuple[int, float]:
    """Step of the newest checkpoint, and the updates that it holds."""
    (newest, *_) = reversed(checkpoints())
    training = Training()
    training.session.resume()
    assert training.session.step == step_of(newest)
    return training.session.step, training.model.bias.item()


def wrapped(steps: Iterator[int]) -> Iterator[int]:
    """As tqdm does it."""
    for step in steps:  # noqa: UP028
        yield step


def breaks(training: Training) -> None:
    for step in training.steps():
        training.step()
        if step == 3:
            break


def breaks_at_the_top(training: Training) -> None:
    for step in training.steps():
        if step == 4:
            break
        training.step()


def returns(training: Training) -> int | None:
    for step in wrapped(training.steps()):
        training.step()
        if step == 3:
            return step
    return None


def returns_from_a_stream(training: Training) -> int | None:
    def streamed() -> Iterator[tuple[int, float]]:
        for step in training.steps():
            yield step, 0.5

    def twice() -> Iterator[tuple[int, float]]:
        yield from streamed()

    for step, _ in wrapped(twice()):  # type: ignore[arg-type, misc]
        training.step()
        if step == 3:
            return step
    return None


def breaks_out_of_more(training: Training) -> None:
    with contextlib.nullcontext():
        for number, (step, _) in enumerate(zip(training.steps(), range(100), strict=False)):
            try:
                training.step()
                if number == 3:
                    break
            finally:
                assert step < 4


def has_no_more_data(training: Training) -> None:
    for _, _ in zip(training.steps(), range(4), strict=False):
        training.step()


def has_no_more_data_first(training: Training) -> None:
    for _, _ in zip(range(4), training.steps(), strict=False):
        training.step()


def takes_a_slice(training: Training) -> None:
    for _ in itertools.islice(training.steps(), 4):
        training.step()


def comes_to_the_end(training: Training) -> None:
    for _ in training.steps(4):
        training.step()


def saves_after_a_loop_whose_iterator_it_holds(training: Training) -> None:
    steps = training.steps()
    bar = wrapped(steps)
    for step in bar:
        training.step()
        if step == 3:
            break
    assert training.session.save()


def saves_after_a_loop_left_at_the_top_whose_iterator_it_holds(training: Training) -> None:
    steps = training.steps()
    for step in steps:
        if step == 4:
            break
        training.step()
    assert training.session.save()


def saves_as_it_returns(training: Training) -> bool:
    steps = training.steps()
    for step in steps:
        if step == 4:
            break
        training.step()
    return training.session.save()  # which the compiler copies to where the break is


def saves_and_breaks(training: Training) -> None:
    for step in training.steps():
        training.step()
        if step == 3:
            assert training.session.save()
            break


def goes_on_by_itself_and_saves(training: Training) -> None:
    for step in training.steps():
        if step == 2:
            break
        training.step()
    for step in range(training.session.step, 4):
        training.step()
        training.session.step_done(step)
    assert training.session.save()


ENDS = [
    breaks,
    breaks_at_the_top,
    returns,
    returns_from_a_stream,
    breaks_out_of_more,
    has_no_more_data,
    has_no_more_data_first,
    takes_a_slice,
    comes_to_the_end,
    saves_after_a_loop_whose_iterator_it_holds,
    saves_after_a_loop_left_at_the_top_whose_iterator_it_holds,
    saves_as_it_returns,
    saves_and_breaks,
    goes_on_by_itself_and_saves,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_however_a_script_ends_its_loop_it_has_saved_what_it_did(
    end: Callable[[Training], object], capfd: pytest.CaptureFixture[str]
) -> None:
    end(Training())
    assert saved() == (4, 4.0)
    assert "in no checkpoint" not in capfd.readouterr().err


def test_wherever_in_its_loop_a_script_saves_the_whole_step_is_saved() -> None:
    training = Training()
    for step in wrapped(training.steps(6)):
        try:
            assert training.session.save()
            if step == 1:
                raise KeyError
        except KeyError:
            assert training.session.save()
        for _ in range(2):
            assert training.session.save()
        training.step()
    end_process()
    found = reversed(Store(Path("ckpt")).committed())
    assert {step_of(path.name) for path in found} <= {1, 2, 3, 4, 5, 6}
    assert saved() == (6, 6.0)


def test_updates_without_an_optimizer_are_told_by_those_before() -> None:
    breaks(Training(by_hand=True))
    assert saved() == (4, 4.0)


class Accumulating(Training):
    """Every third step has an update, all have passes."""

    def step(self) -> None:
        self.model(torch.ones(1, 1)).sum().backward()
        self.count = getattr(self, "count", 0) + 1
        if self.count % 3 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_a_step_that_zip_asked_for_when_there_was_no_batch_left_does_not_count() -> None:
    training = Accumulating()
    for epoch in range(1, 4):
        for _, _ in zip(training.steps(12), range(4), strict=False):
            training.step()
        assert training.session.step == training.count == 4 * epoch


def test_a_pass_without_an_update_is_the_work_of_a_step_where_gradients_accumulate() -> None:
    training = Accumulating()
    for step in training.steps():
        training.step()
        if step == 3:
            break
    assert training.session.step == training.count == 4


def test_a_pass_without_an_update_is_no_step_where_every_step_has_one() -> None:
    training = Training()
    for step in training.steps():
        loss = training.model(torch.ones(1, 1)).sum()
        if step == 3:
            break
        loss.backward()
        training.optimizer.step()
    assert training.session.step == 3


def test_a_step_that_leaves_its_batch_out_says_nothing_of_the_next() -> None:
    training = Training()
    for step, _ in zip(training.steps(), range(4), strict=False):
        if step != 3:
            training.step()
    assert training.session.step == 4


def test_updates_that_no_hook_hears_of_count_where_the_steps_before_had_such() -> None:
    training = Training()
    for step in training.steps():
        training.by_hand = step > 0  # as a CUDA graph that is replayed
        training.step()
        if step == 5:
            break
    assert training.session.step == 6


def test_what_was_saved_by_a_break_is_where_the_next_process_goes_on() -> None:
    breaks(Training())
    end_process()
    comes_to_the_end(again := Training())
    assert again.session.step == 4
    end_process()
    training = Training()
    assert list(training.steps(6)) == [4, 5]


def test_an_exception_in_who_takes_the_steps_from_a_stream_is_no_end_of_the_training() -> None:
    def fails(training: Training) -> None:
        for step in wrapped(wrapped(training.steps())):
            training.step()
            if step == 3:
                raise ValueError

    training = Training()
    with contextlib.suppress(ValueError):
        fails(training)
    assert training.session.step == 3
    assert checkpoints() == []


def test_a_loop_that_is_left_before_anything_is_done_leaves_no_checkpoint() -> None:
    for _ in Training().steps():
        break
    assert checkpoints() == []


def leaves_by_an_exception(training: Training) -> None:
    with contextlib.suppress(ValueError):
        for step in wrapped(training.steps()):
            training.step()
            if step == 3:
                raise ValueError


def exits(training: Training) -> None:
    with contextlib.suppress(SystemExit):
        for step in training.steps():
            training.step()
            if step == 3:
                raise SystemExit(0)


def forgets_to_save(training: Training) -> None:
    for step in range(training.session.resume(), 3):
        training.step()
        training.session.step_done(step)


@pytest.mark.parametrize("end", [leaves_by_an_exception, exits, forgets_to_save])
def test_what_is_in_no_checkpoint_is_said_at_the_end(
    end: Callable[[Training], object], capfd: pytest.CaptureFixture[str]
) -> None:
    end(Training())
    assert checkpoints() == []
    assert "autoglm: steps 1 to 3 are in no checkpoint" in capfd.readouterr().err


def test_the_steps_of_one_epoch_asked_for_again_are_refused_with_what_was_meant() -> None:
    training = Training()
    for _ in training.steps(4):
        training.step()
    with pytest.raises(UsageError, match=r"session\.steps\(4\) was called before") as caught:
        next(training.steps(4))
    assert "session.steps((epoch + 1) * 4)" in caught.value.hint
    assert saved() == (4, 4.0)


def test_a_training_in_phases_goes_on_in_whichever_it_was() -> None:
    def train() -> list[int]:
        training = Training()
        return [step for total in (2, 4, 6) for step in training.steps(total)]

    assert train() == [0, 1, 2, 3, 4, 5]
    end_process()
    assert train() == []


def test_an_epoch_that_is_left_goes_on_where_it_was() -> None:
    training, seen = Training(), []
    for _ in range(3):
        for step in training.steps(6):
            training.step()
            seen.append(step)
            if step % 2:
                break
    assert seen == [0, 1, 2, 3, 4, 5]
    assert saved() == (6, 6.0)


def test_a_total_that_is_less_than_what_was_trained_is_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    comes_to_the_end(Training())
    end_process()
    assert list(Training().steps(3)) == []
    said = capfd.readouterr().err
    assert "autoglm: session.steps(3): the checkpoint is of step 4 already" in said
