"""Loops that take batches in all sorts of ways; killed after any step, they go on unchanged.

Each loop is a function of a sampler, the first step and what says that a step is done; it returns
by itself after some epochs. What its steps trained on is compared.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed.dealing import EpochOver
from autoglm_resume.worker.feed.fetching import Work
from autoglm_resume.worker.feed.sampler import ResumableSampler

SAMPLES, BATCH = 15, 2  # 8 batches in an epoch, the last one of a single sample
EPOCHS = 3

Batch = list[int]


class Numbers(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return SAMPLES


class Killed(Exception):
    pass


class Life:
    """One life of a loop, from the step after `before` on, killed when `last` steps are done."""

    def __init__(self, before: dict[str, Any] | None, first: int, last: int, **options: Any):
        self.sampler = ResumableSampler(SAMPLES, BATCH, rank=0, world_size=1, seed=5, **options)
        self.said: list[str] = []
        self.sampler.follow(lambda: None, self.said.append)
        if before is not None:
            self.sampler.load_state_dict(before)
        self.sampler.resumed()
        self.step = first
        self.last = last
        self.trained: list[list[Batch]] = []
        self.states: list[dict[str, Any]] = []
        self._now: list[Batch] = []

    def loader(self, workers: int = 0) -> DataLoader[int]:
        return DataLoader(Numbers(), batch_sampler=self.sampler, num_workers=workers)

    def train(self, batch: Any) -> None:
        Work.more()
        self._now.append(list(map(int, batch)))

    def step_done(self) -> None:
        self.sampler.step_done()
        self.step += 1
        self.trained.append(self._now)
        self._now = []
        self.states.append(self.sampler.state_dict())
        if self.step == self.last:
            raise Killed

    def epochs(self) -> Iterator[int]:
        """As a script counts them that asks the sampler."""
        return iter(range(self.sampler.epoch, EPOCHS))


Loop = Callable[[Life], None]


def live(loop: Loop, *args: Any, **options: Any) -> Life:
    life = Life(*args, **options)
    with contextlib.suppress(Killed):
        loop(life)
    return life


def every_step(life: Life) -> None:
    for _ in life.epochs():
        for batch in life.loader():
            life.train(batch)
            life.step_done()


def with_workers(life: Life) -> None:
    for _ in life.epochs():
        for batch in life.loader(2):
            life.train(batch)
            life.step_done()


def persistent(life: Life) -> None:
    loader = DataLoader(
        Numbers(), batch_sampler=life.sampler, num_workers=1, persistent_workers=True
    )
    for _ in life.epochs():
        for batch in loader:
            life.train(batch)
            life.step_done()


def without_the_small_last_batch(life: Life) -> None:
    for _ in life.epochs():
        for batch in life.loader():
            if len(batch) == BATCH:
                life.train(batch)
                life.step_done()


def whole_passes(life: Life) -> None:
    life.sampler.training()
    while life.step < EPOCHS:
        for batch in life.loader():
            life.train(batch)
        life.step_done()


def whole_passes_with_workers(life: Life) -> None:
    while life.step < EPOCHS:
        for batch in life.loader(2):
            life.train(batch)
        life.step_done()


def several_passes(life: Life) -> None:
    life.sampler.training()
    while life.step < EPOCHS:
        for _ in range(3):
            for batch in life.loader():
                life.train(batch)
        life.step_done()


def one_ahead(life: Life) -> None:
    """As prefetchers do that copy the next batch to a device meanwhile."""
    for _ in life.epochs():
        batches = iter(life.loader())
        present = next(batches, None)
        while present is not None:
            following = next(batches, None)
            life.train(present)
            life.step_done()
            present = following


def three_ahead(life: Life) -> None:
    for _ in life.epochs():
        batches = iter(life.loader())
        held = list(itertools.islice(batches, 3))
        while held:
            life.train(held.pop(0))
            held += itertools.islice(batches, 1)
            life.step_done()


def listed_first(life: Life) -> None:
    for _ in life.epochs():
        for batch in list(life.loader()):
            life.train(batch)
            life.step_done()


def left_early(life: Life) -> None:
    while life.sampler.epoch < EPOCHS:
        for number, batch in enumerate(life.loader()):
            if number == 3:
                break
            life.train(batch)
            life.step_done()


def looks_between(life: Life) -> None:
    for _ in life.epochs():
        next(iter(life.loader()))
        for batch in life.loader():
            life.train(batch)
            life.step_done()
        if not life.sampler.consumed:
            list(life.loader())


def in_a_thread(life: Life) -> None:
    for _ in life.epochs():
        filled: queue.Queue[Any] = queue.Queue(2)

        def fill(loader: DataLoader[int], into: queue.Queue[Any]) -> None:
            for batch in loader:
                into.put(batch)
            into.put(None)

        thread = threading.Thread(target=fill, args=(life.loader(), filled), daemon=True)
        thread.start()
        try:
            while (batch := filled.get()) is not None:
                life.train(batch)
                life.step_done()
        finally:
            while thread.is_alive():  # or it would fill on
                while not filled.empty():
                    filled.get()
                thread.join(0.01)


LOOPS = [
    *(every_step, persistent, without_the_small_last_batch, whole_passes, several_passes),
    *(one_ahead, three_ahead, listed_first, left_early, looks_between, in_a_thread),
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_whatever_a_loop_takes_it_goes_on_as_it_would_have_and_nothing_is_said(loop: Loop) -> None:
    whole = live(loop, None, 0, -1)
    assert not whole.said
    steps = len(whole.trained)
    assert steps in (EPOCHS, EPOCHS * 7, EPOCHS * 8)
    deaths = range(1, steps) if loop is not persistent else (3, 8, 11)
    for death in deaths:
        killed = live(loop, None, 0, death)
        again = live(loop, killed.states[-1], death, -1)
        assert killed.trained + again.trained == whole.trained, f"killed after {death} steps"
        assert not again.said


@pytest.mark.parametrize(
    "loop", [with_workers, whole_passes_with_workers], ids=lambda loop: loop.__name__
)
def test_workers_that_draw_ahead_change_nothing(loop: Loop) -> None:
    whole, plain = live(loop, None, 0, -1), whole_passes if "whole" in loop.__name__ else every_step
    assert whole.trained == live(plain, None, 0, -1).trained
    again = live(loop, whole.states[1], 2, -1)
    assert whole.trained[2:] == again.trained


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_epoch_is_dealt_in_an_order_of_its_own(loop: Loop) -> None:
    trained = live(loop, None, 0, -1).trained
    orders = [
        trained[n * len(trained) // EPOCHS : (n + 1) * len(trained) // EPOCHS] for n in (0, 1)
    ]
    assert orders[0] != orders[1]
    for steps in orders:
        dealt = [each for batches in steps for batch in batches for each in batch]
        times = 3 if loop is several_passes else 1
        left_out = loop is without_the_small_last_batch
        assert len(dealt) == times * (SAMPLES - left_out)
        assert len(set(dealt)) >= SAMPLES - left_out


def test_a_prefetcher_that_goes_from_epoch_to_epoch_is_dealt_each_as_a_whole() -> None:
    def one_ahead_of_all(life: Life) -> None:
        loader = life.loader()
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        present = next(batches)
        for following in itertools.islice(batches, EPOCHS * 8):
            life.train(present)
            life.step_done()
            present = following

    ahead, plain = live(one_ahead_of_all, None, 0, -1), live(every_step, None, 0, -1)
    assert ahead.trained == plain.trained
    assert ahead.states == plain.states
    assert not ahead.said


def accumulated(life: Life) -> None:
    """Three batches make a step; what is left of an epoch goes into the first step of the next."""
    for _ in life.epochs():
        for number, batch in enumerate(life.loader()):
            life.train(batch)
            if number % 3 == 2:
                life.step_done()


def test_what_an_epoch_leaves_of_a_step_does_not_keep_it_from_ending() -> None:
    whole = live(accumulated, None, 0, -1, batches_per_step=3)
    assert [len(batches) for batches in whole.trained] == [3, 3, 5, 3, 5, 3]
    assert not whole.said
    again = live(accumulated, whole.states[1], 2, -1, batches_per_step=3)
    assert again.trained == whole.trained[2:]


def skipping(life: Life) -> None:
    batches = iter(life.loader())
    for step in range(7):
        batch = next(batches)
        if step in (2, 4):
            batch = next(batches)
        life.train(batch)
        life.step_done()


def by_some_steps_only(life: Life) -> None:
    batches = iter(life.loader())
    for step in range(9):
        if step % 2:
            life.train(next(batches))
        life.step_done()


@pytest.mark.parametrize(
    ("loop", "says"),
    [(skipping, "3 steps took 4 batches"), (by_some_steps_only, r"\d steps took \d batches")],
)
def test_steps_that_take_now_one_batch_and_now_another_number_are_told_once(
    loop: Loop, says: str
) -> None:
    life = live(loop, None, 0, -1, endless=True)
    (said,) = life.said
    assert re.match(says, said)
    assert "a resume would repeat or skip" in said


def test_a_cycle_over_a_loader_is_refused_when_it_would_repeat_its_first_epoch() -> None:
    life = Life(None, 0, -1)
    batches = itertools.cycle(life.loader())
    for _ in range(8):
        next(batches)
        life.step_done()
    with pytest.raises(UsageError, match=r"itertools\.cycle") as caught:
        next(batches)
    assert "endless=True" in caught.value.hint
    assert (life.sampler.epoch, life.sampler.consumed) == (1, 0)


def test_steps_that_repeat_batches_that_were_kept_are_told_once() -> None:
    life = Life(None, 0, -1)
    kept: list[Any] = []
    for batch in life.loader():
        kept.append(batch)
        life.step_done()
    assert not life.said
    for _ in kept:
        life.step_done()
    (said,) = life.said
    assert "endless=True" in said


def test_steps_that_go_on_with_another_loader_are_nothing_to_tell() -> None:
    life = Life(None, 0, -1)
    for _ in itertools.chain(life.loader(), DataLoader(Numbers(), 1)):
        life.step_done()
    assert not life.said


def test_a_loop_that_runs_out_of_batches_is_told_what_to_do_and_others_end() -> None:
    life = Life(None, 0, -1)
    batches = iter(life.loader())
    assert len(list(batches)) == 8
    with pytest.raises(EpochOver, match="endless=True"):
        next(batches)
    assert next(batches, None) is None
    with pytest.raises(StopIteration):
        next(batches)
    assert isinstance(EpochOver(""), UsageError)
    untracked = ResumableSampler(SAMPLES, BATCH, rank=0, world_size=1)
    batches = iter(DataLoader(Numbers(), batch_sampler=untracked))
    list(batches)
    with pytest.raises(StopIteration) as caught:
        next(batches)
    assert not isinstance(caught.value, UsageError)
