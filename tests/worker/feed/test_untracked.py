"""What is said of loaders of which nothing is tracked, and of which nothing is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from autoglm_resume.worker.feed import fetching
from autoglm_resume.worker.feed.fetching import Work
from autoglm_resume.worker.feed.sampler import ResumableSampler
from autoglm_resume.worker.feed.untracked import Untracked

DATA = TensorDataset(torch.arange(32))
EPOCH = 8
"""Steps of four samples."""


@pytest.fixture(autouse=True)
def nothing_begun() -> Iterator[None]:
    fetching._begun.clear()  # of other tests
    yield
    fetching.hear_of(None)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, 4, **{"shuffle": True, **options})


def said_of(step: int, loop: Callable[[Untracked], None]) -> list[str]:
    said: list[str] = []
    loop(Untracked(step, said.append))
    return said


def epochs(data: DataLoader[Any], steps: int = 10, each: int = 1) -> Callable[[Untracked], None]:
    """A loop over `data`, epoch after epoch; `each` batches make a step."""

    def loop(untracked: Untracked) -> None:
        batches = itertools.chain.from_iterable(itertools.repeat(data))
        for _ in range(steps):
            for _ in range(each):
                next(batches)
                Work.more()
            untracked.step_done()

    return loop


def own() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("step", [EPOCH, 3])
@pytest.mark.parametrize(
    "data",
    [
        loader(generator=own()),
        DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=own())),
        DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 32, 32, generator=own())),
    ],
)
def test_an_order_from_a_generator_of_its_own_is_told_wherever_the_run_goes_on(
    data: DataLoader[Any], step: int
) -> None:
    (said,) = said_of(step, epochs(data))
    assert "a generator of its own that no checkpoint has" in said
    assert not said_of(0, epochs(data))


def test_persistent_workers_are_told_wherever_the_run_goes_on() -> None:
    (said,) = said_of(EPOCH, epochs(loader(num_workers=1, persistent_workers=True), 2))
    assert "the persistent workers of a DataLoader of TensorDataset begin anew" in said


@pytest.mark.parametrize(
    ("step", "each", "told"),
    [(EPOCH, 1, False), (3, 1, True), (EPOCH // 2, 2, False), (1, 2, True), (0, 1, False)],
)
def test_a_plain_loader_is_told_where_its_epoch_does_not_begin(
    step: int, each: int, told: bool
) -> None:
    assert len(said_of(step, epochs(loader(), each=each))) == told


@pytest.mark.parametrize(("step", "told"), [(EPOCH, True), (2 * EPOCH, False)])
def test_a_loader_that_every_other_step_takes_from_is_told_within_its_epoch(
    step: int, told: bool
) -> None:
    def loop(untracked: Untracked) -> None:
        batches = iter(loader())
        for number in range(6):
            if number % 2 == 0:
                next(batches)
            Work.more()
            untracked.step_done()

    assert len(said_of(step, loop)) == told


def test_a_batch_that_is_taken_ahead_makes_no_epoch() -> None:
    def loop(untracked: Untracked) -> None:
        batches = iter(loader())
        next(batches)
        for _ in range(6):
            next(batches)
            untracked.step_done()

    assert len(said_of(EPOCH // 2, loop)) == 1


def test_a_step_that_is_a_whole_pass_begins_where_it_should() -> None:
    def loop(data: DataLoader[Any]) -> Callable[[Untracked], None]:
        def inner(untracked: Untracked) -> None:
            for _ in range(3):
                for _ in data:
                    Work.more()
                untracked.step_done()

        return inner

    assert not said_of(3, loop(loader()))
    assert len(said_of(3, loop(loader(generator=own())))) == 1


def test_looks_and_validation_are_nothing_to_tell() -> None:
    def loop(untracked: Untracked) -> None:
        next(iter(loader()))
        list(loader(generator=own()))
        held = iter(loader())
        with torch.no_grad():
            for _ in itertools.islice(held, 3):
                Work.more()
        untracked.step_done()
        later = iter(loader())
        next(later)
        untracked.step_done()

    assert not said_of(3, loop)


def test_each_loader_is_told_whatever_else_is_tracked() -> None:
    sampler = ResumableSampler(32, 4, rank=0, world_size=1, endless=True)
    sampler.follow(lambda: None, print)

    def loop(untracked: Untracked) -> None:
        all_batches = [iter(DataLoader(DATA, batch_sampler=sampler)), iter(loader())]
        all_batches.append(iter(loader(generator=own())))
        for _ in range(6):
            for batches in all_batches:
                next(batches)
            untracked.step_done()

    said = said_of(3, loop)
    assert len(said) == 2
    assert "of which nothing is tracked" in said[0]
    assert "a generator of its own" in said[1]
