"""Loaders that keep their position by themselves, and those of which nobody knows it."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.random import RandomState
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import autoglm_resume as autoglm
from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed import fetching
from tests.worker.alone import end_process, lonely
from tests.worker.feed.feeding import FEEDS
from tests.worker.feed.test_feeding import fed


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    fetching._begun.clear()  # of other tests
    with lonely(tmp_path):
        yield


class CountingDataLoader:
    """Deals 0 to 4 in every epoch, and counts what it hands out."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.at, 5):
            self.at = number + 1
            yield number
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def session_of(**tracked: Any) -> Any:
    session = autoglm.init(checkpoint_dir="ckpt", every_steps=1)
    session.track(**tracked)
    return session


def trained(steps: int) -> None:
    """A run that ended after so many steps."""
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    step = session.resume()
    while step < steps:
        for _ in loader:
            session.step_done(step)
            step += 1
            if step == steps:
                break
    session.save()
    end_process()


def test_a_restored_position_takes_effect_though_the_loader_has_begun() -> None:
    trained(3)
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    batches = iter(loader)
    assert next(batches) == 3
    assert session.resume() == 3


def test_a_look_at_a_batch_costs_none() -> None:
    trained(3)
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    assert next(iter(loader)) == 3
    session.resume()
    assert next(iter(loader)) == 3
    assert list(loader) == [3, 4]
    session.step_done(3)
    assert list(loader) == [0, 1, 2, 3, 4]


def test_a_loader_that_was_saved_at_the_end_of_an_epoch_begins_the_next_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    trained(5)
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    session.resume()
    assert list(loader) == [0, 1, 2, 3, 4]
    session.step_done(5)
    assert list(loader) == [0, 1, 2, 3, 4]
    assert capfd.readouterr().err.count("loader was saved at the end of an epoch") == 1


def test_a_batch_that_is_taken_before_its_step_is_refused() -> None:
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    with pytest.raises(UsageError, match="a batch was taken before") as caught:
        next(zip(loader, session.steps(3), strict=False))
    assert "session.steps(n) first" in caught.value.hint
    assert list(zip(session_of(loader=loader).steps(3), loader, strict=False))


def test_batches_that_are_taken_ahead_of_their_steps_are_refused() -> None:
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    session.resume()
    batches = iter(loader)
    next(batches)
    next(batches)
    session.step_done(0)
    next(batches)
    with pytest.raises(UsageError, match="first step took 2 batches, the second one 1"):
        session.step_done(1)


def test_steps_may_take_several_batches() -> None:
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    batches = iter(loader)
    for _ in session.steps(2):
        next(batches), next(batches)


def test_a_tracked_loader_that_nobody_iterates_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    session = session_of(loader=CountingDataLoader())
    session.resume()
    session.step_done(0)
    session.step_done(1)
    assert capfd.readouterr().err.count("the first step took nothing from it") == 1


def test_a_followed_loader_is_still_what_it_was() -> None:
    loader = CountingDataLoader()
    session_of(loader=loader)
    assert isinstance(loader, CountingDataLoader)
    assert type(loader).__name__ == "CountingDataLoader"
    assert list(copy.deepcopy(loader)) == [0, 1, 2, 3, 4], "a copy is nobody's"


def test_a_cycle_over_a_tracked_loader_is_refused_when_it_would_repeat_its_first_epoch() -> None:
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    session.resume()
    batches = itertools.cycle(loader)
    for step in range(5):
        next(batches)
        session.step_done(step)
    with pytest.raises(UsageError, match=r"loader: itertools\.cycle"):
        next(batches)


def test_steps_that_repeat_kept_batches_of_a_tracked_loader_are_told_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loader = CountingDataLoader()
    session = session_of(loader=loader)
    session.resume()
    for step, _ in enumerate(itertools.chain(loader, range(5))):
        session.step_done(step)
    assert capfd.readouterr().err.count("steps go on, and no loader deals anything") == 1


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(12)


def trained_untracked(loader: DataLoader[int], steps: int) -> None:
    model = torch.nn.Linear(1, 1)
    session = session_of(model=model)
    step = session.resume()
    for _ in zip(loader, range(step, steps), strict=False):
        session.step_done(step)
        step += 1
    session.save()
    end_process()


@pytest.mark.parametrize("loader", [DataLoader(Numbers(), 3, shuffle=True), DataLoader(Stream())])
def test_that_data_begin_anew_is_said_once(
    loader: DataLoader[int], capfd: pytest.CaptureFixture[str]
) -> None:
    trained_untracked(loader, 2)
    assert "nothing is tracked" not in capfd.readouterr().err
    trained_untracked(loader, 3)
    said = capfd.readouterr().err
    assert said.count("goes on at step 2, and its data with the first batch of a DataLoader") == 1


def test_a_run_that_goes_on_with_an_epoch_of_its_own_is_left_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loader = DataLoader(Numbers(), 3, shuffle=True)
    trained_untracked(loader, 4)
    trained_untracked(loader, 6)
    assert "nothing is tracked" not in capfd.readouterr().err


def test_a_resumable_sampler_that_is_not_tracked_is_told_before_it_is_missed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    sampler = autoglm.ResumableSampler(12, 3)
    trained_untracked(DataLoader(Numbers(), batch_sampler=sampler), 2)
    assert capfd.readouterr().err.count("ResumableSampler is not tracked") == 1


@dataclass
class Augmented(Numbers):
    transforms: list[Any]


@pytest.mark.parametrize(
    "own", [random.Random(1), numpy.random.default_rng(1), torch.Generator(), RandomState(1)]
)
def test_a_generator_that_a_data_set_holds_is_told(
    own: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    sampler = autoglm.ResumableSampler(12, 3, endless=True)
    data = Augmented([{"noise": own}, numpy.zeros(9), torch.zeros(9)])
    session = session_of(sampler=sampler)
    batches = iter(DataLoader(data, batch_sampler=sampler))
    for _ in session.steps(3):
        next(batches)
    said = capfd.readouterr().err
    assert said.count("Augmented.transforms[0]['noise'] is a generator of its own") == 1


def test_a_plain_loader_is_refused_with_what_to_track() -> None:
    with pytest.raises(UsageError, match="DataLoader has no state_dict") as caught:
        session_of(loader=DataLoader(Numbers()))
    assert "autoglm.ResumableSampler" in caught.value.hint


def test_batches_out_of_order_are_refused() -> None:
    sampler = autoglm.ResumableSampler(12, 3)
    session_of(sampler=sampler)
    loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=2, in_order=False)
    with pytest.raises(UsageError, match="in_order=False"):
        iter(loader)


class KnowingStream(Stream):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 12:
            self.at += 1
            yield self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_tracked_stream_is_in_its_place_when_its_loader_begins() -> None:
    def life(steps: int) -> list[int]:
        session = session_of(stream=(stream := KnowingStream()))
        batches = iter(DataLoader(stream, None))
        seen = [next(batches) for _ in session.steps(steps)]
        end_process()
        return seen

    assert life(3) == [1, 2, 3]
    assert life(6) == [4, 5, 6]


def test_a_tracked_stream_of_which_workers_have_copies_is_refused() -> None:
    session_of(stream=(stream := KnowingStream()))
    with pytest.raises(UsageError, match="have copies of its KnowingStream"):
        iter(DataLoader(stream, num_workers=1))


def test_another_sampler_that_counts_what_is_drawn_is_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Counting(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    session_of(sampler=Counting())
    assert "a Counting counts what a loader draws from it" in capfd.readouterr().err


torchdata = pytest.importorskip("torchdata.stateful_dataloader")


def test_two_positions_in_one_loader_are_refused() -> None:
    sampler = autoglm.ResumableSampler(12, 3)
    loader = torchdata.StatefulDataLoader(Numbers(), batch_sampler=sampler)
    with pytest.raises(UsageError, match="a position of their own"):
        session_of(loader=loader)


def test_a_stream_without_state_is_refused() -> None:
    with pytest.raises(UsageError, match="Stream has no state"):
        session_of(loader=torchdata.StatefulDataLoader(Stream()))


@pytest.mark.slow
def test_a_killed_training_is_fed_the_same_by_a_stateful_loader(tmp_path: Path) -> None:
    feeds = [feed for feed in FEEDS if feed.startswith("stateful")]
    found = fed(tmp_path, {("epochs", feed): (3, 7, 12, 15) for feed in feeds})  # 7 ends an epoch
    for (_, feed), (undisturbed, killed) in found.items():
        assert [step for step, *_ in killed] == list(range(24)), feed
        assert killed == undisturbed, feed
        assert len({str(batch) for _, batch, *_ in killed}) == 24, f"{feed}: no noise comes twice"
