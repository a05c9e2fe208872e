"""Which rank stores what several ranks hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Event

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks.cut import Position
from autoglm_resume.checkpoint.write import chunk_ownership
from autoglm_resume.checkpoint.write.chunk_ownership import (
    claim_file,
    left_to_peers,
    publish,
    retract,
)

Held = Mapping[Position, str]

places = st.tuples(st.sampled_from(["m/a", "m/b", "o/c#1"]), st.integers(0, 3))
held = st.dictionaries(places, st.sampled_from("vwxyz"))


@contextmanager
def impatient(seconds: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_ownership, "PATIENCE", seconds)
        yield


def left(directory: Path, ranks: list[Held], rank: int) -> frozenset[str]:
    return left_to_peers(directory, rank, len(ranks), ranks[rank], Event())


def stored(held_by: Held, left_by: frozenset[str]) -> set[str]:
    return set(held_by.values()) - left_by


@given(st.lists(held, min_size=1, max_size=5), st.data())
@settings(max_examples=150)
def test_every_chunk_is_stored_by_somebody_whoever_speaks_and_whoever_hears_it(
    ranks: list[Held], data: st.DataObject
) -> None:
    late = data.draw(st.sets(st.integers(0, len(ranks) - 1)))
    with tempfile.TemporaryDirectory() as place, impatient(0.0):
        directory = Path(place)
        for rank, mine in enumerate(ranks):
            if rank not in late:
                publish(directory, rank, mine)
        answers = {
            rank: left(directory, ranks, rank) for rank in range(len(ranks)) if rank not in late
        }
        for rank in sorted(late):  # each hears one more than the one before
            publish(directory, rank, ranks[rank])
            answers[rank] = left(directory, ranks, rank)
    everywhere = {name for mine in ranks for name in mine.values()}
    by_rank = [stored(mine, answers[rank]) for rank, mine in enumerate(ranks)]
    assert set().union(*by_rank) == everywhere
    for rank, names in answers.items():
        assert names <= set(ranks[rank].values())
        others = set().union(*(by_rank[other] for other in range(len(ranks)) if other != rank))
        assert names <= others, "what a rank leaves, another one stores"


@given(st.lists(held, min_size=2, max_size=4))
@settings(max_examples=60)
def test_with_all_heard_what_is_in_one_place_everywhere_is_stored_once(ranks: list[Held]) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for rank, mine in enumerate(ranks):
            publish(directory, rank, {("same", 0): "s", ("alone", rank): f"r{rank}", **mine})
        mine_too = [
            {("same", 0): "s", ("alone", rank): f"r{rank}", **mine}
            for rank, mine in enumerate(ranks)
        ]
        by_rank = [stored(mine, left(directory, mine_too, r)) for r, mine in enumerate(mine_too)]
    assert sum("s" in names for names in by_rank) == 1
    assert all(f"r{rank}" in names for rank, names in enumerate(by_rank))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_what_all_hold_is_split_about_evenly(tmp_path: Path, world_size: int) -> None:
    same = {(f"model/layers.{n}.weight", p): f"d{n}.{p}" for n in range(60) for p in range(10)}
    ranks: list[Held] = [same] * world_size
    for rank in range(world_size):
        publish(tmp_path, rank, same)
    shares = [len(stored(same, left(tmp_path, ranks, rank))) for rank in range(world_size)]
    assert sum(shares) == len(same)
    assert max(shares) < 1.3 * len(same) / world_size


def test_what_is_in_another_place_or_differs_is_stored_by_its_own_rank(tmp_path: Path) -> None:
    ranks: list[Held] = [{("a", 0): "x", ("b", 0): "mine"}, {("a", 1): "x", ("b", 0): "other"}]
    for rank, mine in enumerate(ranks):
        publish(tmp_path, rank, mine)
    assert [left(tmp_path, ranks, rank) for rank in (0, 1)] == [frozenset()] * 2


def test_ranks_that_speak_at_their_own_time_agree(tmp_path: Path) -> None:
    same = {("a", place): f"d{place}" for place in range(50)}
    barriers = [Barrier(2) for _ in range(3)]

    def rank(number: int) -> frozenset[str]:
        if number:  # each speaks when the one before has begun to listen, or is about to
            barriers[number - 1].wait()
        publish(tmp_path, number, same)
        if number < 3:
            barriers[number].wait()
        return left_to_peers(tmp_path, number, 4, same, Event())

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(rank, range(4)))
    by_rank = [stored(same, answer) for answer in answers]
    assert sorted(name for names in by_rank for name in names) == sorted(same.values())


def test_a_save_that_is_given_up_waits_for_nobody(tmp_path: Path) -> None:
    abandoned = Event()
    abandoned.set()
    publish(tmp_path, 0, {("a", 0): "x"})
    with impatient(1e9):
        assert left_to_peers(tmp_path, 0, 2, {("a", 0): "x"}, abandoned) == frozenset()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'"x"', b"3"])
def test_a_claim_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    publish(tmp_path, 0, {("a", 0): "x"})
    (tmp_path / claim_file(1)).write_bytes(content)
    with impatient(0.0):
        assert left(tmp_path, [{("a", 0): "x"}] * 2, 0) == frozenset()


def test_claims_are_temporary_files_and_go_when_retracted(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.pack").touch()
    for rank in (0, 2):
        publish(tmp_path, rank, {("a", 0): "x"})
    assert sum(path.name.startswith(files.TEMPORARY) for path in tmp_path.iterdir()) == 2
    retract(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.pack"]
