from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed.sampler import ResumableSampler


def samplers(world: int, size: int, batch: int, **options: Any) -> list[ResumableSampler]:
    return [
        ResumableSampler(size, batch, rank=rank, world_size=world, **options)
        for rank in range(world)
    ]


def consume(group: list[ResumableSampler], most: int | None = None) -> list[list[list[int]]]:
    """Up to `most` steps of one epoch, by all ranks in step; each step's batches by rank."""
    steps = []
    for batches in zip(*group, strict=True):
        steps.append(list(batches))
        for sampler in group:
            sampler.advance()
        if len(steps) == most:
            break
    return steps


sizes = st.integers(1, 300)
worlds = st.integers(1, 6)
batches = st.integers(1, 20)


@given(sizes, batches, worlds, st.booleans(), st.integers(0, 9))
def test_every_sample_comes_exactly_once_per_epoch(
    size: int, batch: int, world: int, shuffle: bool, seed: int
) -> None:
    assume(size >= world)
    group = samplers(world, size, batch, shuffle=shuffle, seed=seed)
    for epoch in range(2):
        steps = consume(group)
        dealt = [sample for step in steps for one in step for sample in one]
        assert sorted(dealt) == list(range(size))
        assert all(one for step in steps for one in step), "nobody gets an empty batch"
        assert all(len(one) <= batch + 1 for step in steps for one in step)
        assert all(len(one) == batch for step in steps[:-1] for one in step)
        states = [sampler.state_dict() for sampler in group]
        assert states == [{**states[0], "epoch": epoch + 1, "consumed": 0}] * world


@given(
    size=sizes,
    batch=batches,
    world=worlds,
    cuts=st.lists(st.integers(1, 12), max_size=8),
    wasted=st.integers(0, 4),
)
def test_interruptions_at_any_step_change_nothing(
    size: int, batch: int, world: int, cuts: list[int], wasted: int
) -> None:
    assume(size >= world)
    whole = samplers(world, size, batch, seed=3)
    expected = [step for _ in range(3) for step in consume(whole)]
    group = samplers(world, size, batch, seed=3)
    seen: list[list[list[int]]] = []
    for cut in [*cuts, 10**6, 10**6, 10**6]:
        if len(seen) >= len(expected):
            break
        seen += consume(group, cut)
        states = [sampler.state_dict() for sampler in group]
        # What is drawn and not trained on must not count.
        for sampler in group:
            for _ in zip(range(wasted), sampler, strict=False):
                pass
        group = samplers(world, size, batch, seed=3)
        for sampler, state in zip(group, states, strict=True):
            sampler.load_state_dict(state)
    while len(seen) < len(expected):
        seen += consume(group)
    assert seen[: len(expected)] == expected


@given(size=sizes, batch=batches, world=worlds, new_world=worlds, steps=st.integers(1, 10))
def test_a_changed_world_size_still_deals_the_rest_exactly_once(
    size: int, batch: int, world: int, new_world: int, steps: int
) -> None:
    assume(size >= max(world, new_world))
    group = samplers(world, size, batch)
    before = consume(group, steps)
    state = group[0].state_dict()
    assume(state["epoch"] == 0)
    assume(size - state["consumed"] >= new_world)
    fresh = samplers(new_world, size, batch)
    for sampler in fresh:
        sampler.load_state_dict(state)
    after = consume(fresh)
    assert all(one for step in after for one in step), "nobody gets an empty batch"
    dealt = Counter(sample for step in before + after for one in step for sample in one)
    assert dealt == Counter(range(size))


def test_more_ranks_than_samples_left_are_refused() -> None:
    group = samplers(2, 10, 1)
    consume(group, 4)
    state = group[0].state_dict()
    for sampler in samplers(4, 10, 1):
        with pytest.raises(UsageError, match="2 samples are left in epoch 0") as caught:
            sampler.load_state_dict(state)
        assert "at most 2 ranks" in caught.value.hint
        assert sampler.consumed == 0
    for sampler in samplers(2, 10, 1):
        sampler.load_state_dict(state)


@given(st.integers(4, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30))
def test_an_endless_one_goes_on_and_several_batches_make_a_step(
    size: int, batch: int, per_step: int, steps: int
) -> None:
    def drawn(sampler: ResumableSampler, count: int) -> list[list[int]]:
        return [one for _, one in zip(range(count), sampler, strict=False)]

    sampler = ResumableSampler(
        size, batch, endless=True, batches_per_step=per_step, rank=0, world_size=1
    )
    expected = drawn(sampler, 2 * steps * per_step)
    for _ in range(steps):
        sampler.advance()
    assert drawn(sampler, steps * per_step) == expected[steps * per_step :]
    full = [sample for one in expected for sample in one]
    for start in range(0, len(full) - size + 1, size):
        assert sorted(full[start : start + size]) == list(range(size))


def test_a_short_last_step_of_an_epoch_takes_nothing_from_the_next_one() -> None:
    sampler = ResumableSampler(10, 1, batches_per_step=4, rank=0, world_size=1)
    loader = DataLoader(list(range(10)), batch_sampler=sampler)
    for _ in range(2):
        seen: list[int] = []
        batches = [int(one) for one in loader]
        for start in range(0, len(batches), 4):
            seen += batches[start : start + 4]
            sampler.advance()
        assert sorted(seen) == list(range(10))


def test_epochs_and_seeds_are_dealt_in_different_orders() -> None:
    def order(seed: int, epochs: int) -> list[int]:
        sampler = ResumableSampler(50, 50, seed=seed, rank=0, world_size=1)
        return [consume([sampler])[0][0] for _ in range(epochs)][-1]

    orders = [order(seed, epochs) for seed in (0, 1) for epochs in (1, 2)]
    assert len(set(map(tuple, orders))) == 4
    assert order(1, 2) == orders[3]


def test_drawing_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    list(ResumableSampler(50, 3, rank=0, world_size=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("size", "batch", "world"), [(1, 4, 2), (0, 1, 1), (10, 0, 1)])
def test_too_few_samples_are_refused(size: int, batch: int, world: int) -> None:
    with pytest.raises(UsageError, match=f"{size} samples in batches of {batch}"):
        ResumableSampler(size, batch, rank=0, world_size=world)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"size": 11}, "size was 10 when the checkpoint was made and is 11 now"),
        ({"seed": 1}, "seed was 0"),
        ({"shuffle": False}, "shuffle was True"),
    ],
)
def test_the_state_of_other_data_is_refused_and_changes_nothing(
    changed: dict[str, Any], says: str
) -> None:
    group = samplers(1, 10, 2)
    consume(group, 2)
    options = {"size": 10, "seed": 0, "shuffle": True, **changed}
    other = ResumableSampler(options.pop("size"), 2, rank=0, world_size=1, **options)
    with pytest.raises(UsageError, match=says) as caught:
        other.load_state_dict(group[0].state_dict())
    assert "back to" in caught.value.hint
    assert (other.epoch, other.consumed) == (0, 0)


def test_rank_and_world_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = ResumableSampler(9, 1, shuffle=False)
    assert [one for (one,) in sampler] == [2, 5, 8]


class Numbers(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 41


def test_a_loader_that_reads_ahead_in_processes_loses_and_repeats_nothing() -> None:
    def loader(sampler: ResumableSampler) -> DataLoader[int]:
        return DataLoader(
            Numbers(),
            batch_sampler=sampler,
            num_workers=2,
            prefetch_factor=4,
            generator=torch.Generator().manual_seed(0),
        )

    first = ResumableSampler(41, 3, rank=0, world_size=1)
    seen: list[int] = []
    for steps, batch in enumerate(loader(first), 1):
        seen += batch.tolist()
        first.advance()
        if steps == 5:
            break
    second = ResumableSampler(41, 3, rank=0, world_size=1)
    second.load_state_dict(first.state_dict())
    for batch in loader(second):
        seen += batch.tolist()
        second.advance()
    assert sorted(seen) == list(range(41))
    assert seen == [n for one in ResumableSampler(41, 3, rank=0, world_size=1) for n in one]
    assert (second.epoch, second.consumed) == (1, 0)


def test_an_iteration_begins_where_its_first_batch_is_drawn_not_where_it_was_made() -> None:
    sampler = ResumableSampler(41, 3, rank=0, world_size=1)
    begun = iter(sampler)
    state = {**sampler.state_dict(), "consumed": 9}
    expected = list(ResumableSampler(41, 3, rank=0, world_size=1))[3]
    sampler.load_state_dict(state)
    assert next(begun) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_drew_batches_before_the_position_was_loaded_is_refused(workers: int) -> None:
    sampler = ResumableSampler(41, 3, rank=0, world_size=1)
    batches = iter(DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers))
    if not workers:
        next(batches)
    sampler.load_state_dict({**sampler.state_dict(), "consumed": 9})
    with pytest.raises(UsageError, match="batches were drawn before") as caught:
        next(batches)
    assert "iter(loader)" in caught.value.hint


def test_what_follows_a_session_asks_for_its_place_before_each_first_batch_only() -> None:
    sampler = ResumableSampler(41, 3, rank=0, world_size=1)
    asked: list[int] = []

    def find_place() -> None:
        asked.append(1)
        if len(asked) == 1:
            sampler.load_state_dict({**sampler.state_dict(), "consumed": 9})

    sampler.follow(find_place, print)
    batches = iter(sampler)
    assert not asked
    expected = list(ResumableSampler(41, 3, rank=0, world_size=1))
    assert [next(batches), next(batches)] == expected[3:5]
    assert len(asked) == 1
    list(sampler)
    assert len(asked) == 2


def test_a_sampler_that_a_session_moves_is_not_moved_by_hand() -> None:
    sampler = ResumableSampler(41, 3, rank=0, world_size=1)
    sampler.follow(lambda: None, print)
    with pytest.raises(UsageError, match=r"session\.step_done\(\) does it"):
        sampler.advance()
    assert sampler.consumed == 0
    copy.deepcopy(sampler).advance()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_nothing_from_the_global_generators(workers: int) -> None:
    class Random(Numbers):
        def __getitem__(self, index: int) -> int:
            return int(torch.randint(9, ())) + random.randrange(9)

    sampler = ResumableSampler(41, 3, rank=0, world_size=1)
    before = torch.get_rng_state(), random.getstate()
    seen = list(DataLoader(Random(), batch_sampler=sampler, num_workers=workers))
    assert len({str(batch) for batch in seen}) > 5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(("takes", "counted"), [(2, 1), (1, 2), (1, 1), (4, 4)])
@pytest.mark.parametrize("workers", [0, 2])
def test_steps_that_take_other_numbers_of_batches_than_are_counted_are_told_once(
    workers: int, takes: int, counted: int
) -> None:
    said: list[str] = []
    sampler = ResumableSampler(41, 1, rank=0, world_size=1, endless=True, batches_per_step=counted)
    sampler.follow(lambda: None, said.append)
    batches = iter(DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers))
    for _ in range(12):
        for _ in range(takes):
            next(batches)
        sampler.step_done()
    assert len(said) == (takes != counted)
    assert all(f"takes {takes} batches, and the" in text for text in said)


@given(
    size=st.integers(1, 200),
    batch=st.integers(1, 20),
    world=st.integers(1, 5),
    endless=st.booleans(),
)
def test_its_length_is_the_number_of_batches_of_an_epoch(
    size: int, batch: int, world: int, endless: bool
) -> None:
    assume(size >= world)
    for rank in range(world):
        sampler = ResumableSampler(size, batch, rank=rank, world_size=world)
        assert len(list(sampler)) == len(sampler)
    unending = ResumableSampler(size, batch, rank=0, world_size=world, endless=endless)
    assert len(unending) == len(sampler)


def test_a_progress_bar_over_its_loader_knows_how_long_that_is() -> None:
    sampler = ResumableSampler(30, 4)
    assert len(torch.utils.data.DataLoader(list(range(30)), batch_sampler=sampler)) == 8
