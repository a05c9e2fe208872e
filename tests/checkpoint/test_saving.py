"""Savers over a series of checkpoints: what they share."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store import retention
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.retention import KeepRules, RetentionEntry
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import chunk_ownership, part_writer
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.errors import CorruptCheckpoint
from tests.checkpoint.series import SMALL, Tensors, assert_holds, files_in, series, taken


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt")


def test_every_kept_checkpoint_of_a_series_restores_bit_by_bit_with_few_others(
    store: Store,
) -> None:
    one = PartWriter(store, SMALL)
    held: dict[str, Tensors] = {}
    codecs = set()
    for step, tensors in enumerate(series(12), 1):
        part = one.persist(taken(step, tensors)).part
        held[part.id] = tensors
        codecs |= {chunk.codec for chunk in part.chunks}
        assert len(part.needs) <= 3
        found = [RetentionEntry.of(store.load_manifest(path)) for path in store.committed()]
        for id in retention.doomed(found, KeepRules(last=2), frozenset(), 0.0):
            store.delete(id)
            del held[id]
        assert {path.name for path in store.committed()} == set(held)
        for id, expected in held.items():
            assert_holds(store, id, expected)
            assert examine(store, store.directory(id), deep=True).integrity.ok
    assert "delta4" in codecs
    assert len(held) < 7


def test_a_drifting_weight_costs_less_as_a_delta_and_what_is_frozen_nothing(store: Store) -> None:
    one = PartWriter(store, SaveOptions("small"))
    first, second, *_ = [one.persist(taken(n, t)).part for n, t in enumerate(series(3), 1)]
    assert second.stored < 0.7 * first.stored
    assert second.shared > 50_000 * 4 * 0.8
    assert second.needs == (first.id,)


@pytest.mark.parametrize("compress", ["off", "fast", "auto"])
def test_identical_chunks_are_taken_from_the_checkpoint_before_at_any_setting(
    store: Store, compress: Any
) -> None:
    tensors = {"a": torch.randn(CHUNK_BYTES), "b": torch.randn(1000)}
    one = PartWriter(store, SaveOptions(compress))
    first = one.persist(taken(1, tensors)).part
    again = one.persist(taken(2, tensors)).part
    assert (again.stored, again.shared, again.needs) == (0, first.stored, (first.id,))
    assert_holds(store, again.id, tensors)


def test_a_saver_that_comes_after_a_restart_goes_on_sharing_but_has_no_bases(store: Store) -> None:
    states = list(series(3))
    before = PartWriter(store, SMALL)
    before.persist(taken(1, states[0]))
    part = before.persist(taken(2, states[1])).part
    after = PartWriter(store, SMALL)
    after.follow(PreviousPart(store.load_part(store.directory(part.id), 0)))
    third = after.persist(taken(3, states[2])).part
    assert third.shared > 0
    assert all(chunk.base is None for chunk in third.chunks if chunk.pack == 0)
    assert_holds(store, third.id, states[2])


def test_memory_that_is_used_again_is_no_base(store: Store) -> None:
    """As with one slot, and as when a slot is overwritten in the middle of a save."""
    states = list(series(2))
    slot = {name: tensor.clone() for name, tensor in states[0].items()}
    one = PartWriter(store, SMALL)
    first = capture.take({"m": slot}, id=checkpoint_id(1, "a0"), rank=0, world_size=1)
    known = {chunk.digest for chunk in one.persist(first).part.chunks}
    for name, tensor in slot.items():
        tensor.copy_(states[1][name])
    second = one.persist(capture.take({"m": slot}, id=checkpoint_id(2, "a0"), rank=0, world_size=1))
    assert all(chunk.base is None for chunk in second.part.chunks if chunk.digest not in known)
    assert_holds(store, second.part.id, states[1])


@pytest.mark.parametrize("what", ["manifest", "checkpoint"])
def test_a_checkpoint_that_is_not_committed_is_never_referred_to(store: Store, what: str) -> None:
    states = list(series(2))
    one = PartWriter(store, SMALL)
    first = one.persist(taken(1, states[0])).part
    if what == "manifest":
        (store.directory(first.id) / "manifest.json").unlink()
    else:
        store.delete(first.id)
    second = one.persist(taken(2, states[1])).part
    assert second.needs == ()
    assert_holds(store, second.id, states[1])


def test_a_bad_base_is_blamed_by_its_own_file(store: Store) -> None:
    one = PartWriter(store, SMALL)
    parts = [one.persist(taken(n, t)).part for n, t in enumerate(series(3), 1)]
    delta = next(c for c in parts[2].chunks if c.pack == 0 and c.base is not None)
    base = delta
    while base.base is not None:
        base = parts[2].chunks[base.base]
    assert base.pack is not None
    pack = store.directory(parts[2].packs[base.pack].id) / parts[2].pack
    content = bytearray(pack.read_bytes())
    content[base.offset + base.stored // 2] ^= 4
    pack.write_bytes(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        restore.read(store, store.directory(parts[2].id), 0)
    assert caught.value.message.startswith(f"{pack}: m/")
    facts = examine(store, store.directory(parts[2].id))
    assert not facts.integrity.ok
    assert facts.integrity.problem.startswith(f"{pack}: ")


# Several ranks


def all_ranks(
    store: Store, snapshots: list[Snapshot], savers: list[PartWriter]
) -> list[part_writer.Saved]:
    with ThreadPoolExecutor(len(savers)) as pool:
        return list(
            pool.map(lambda pair: pair[0].persist(pair[1]), zip(savers, snapshots, strict=True))
        )


def test_what_all_ranks_hold_is_stored_once_and_each_restores_all_of_it(store: Store) -> None:
    savers = [PartWriter(store, SMALL) for _ in range(3)]
    held: dict[str, list[Tensors]] = {}
    alone = PartWriter(Store(store.root.parent / "alone"), SMALL)
    for step, tensors in enumerate(series(6), 1):
        del tensors["target"]  # who stores a chunk depends on its place, and this one has two
        each = [{**tensors, "own": torch.full((1000,), float(rank))} for rank in range(3)]
        saved = all_ranks(store, [taken(step, t, r, 3) for r, t in enumerate(each)], savers)
        manifest = store.load_manifest(store.directory(saved[0].part.id))
        by_one = alone.persist(taken(step, tensors)).part
        assert manifest.stored < 1.2 * by_one.stored + 10_000
        if step == 1:
            assert max(one.part.stored for one in saved) < 0.7 * by_one.stored
        held[manifest.id] = each
        assert not [name for name in files_in(store.root) if name.startswith(".tmp-")]
    for id, each in held.items():
        assert examine(store, store.directory(id), deep=True).integrity.ok
        for rank, tensors in enumerate(each):
            assert_holds(store, id, tensors, rank)


def test_ranks_in_real_processes_share_as_well(store: Store) -> None:
    fork = multiprocessing.get_context("fork")
    (tensors,) = series(1)

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        PartWriter(store).persist(taken(1, tensors, number, 2))

    processes = [fork.Process(target=rank, args=[number]) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    parts = [store.load_part(store.directory(checkpoint_id(1, "a0")), r) for r in (0, 1)]
    owned = [{c.digest for c in part.chunks if c.pack is not None} for part in parts]
    assert owned[0] & owned[1] == set()
    assert all(owned)
    for number in (0, 1):
        assert_holds(store, parts[0].id, tensors, number)


def test_a_rank_whose_peer_says_nothing_stores_everything_itself(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_ownership, "PATIENCE", 0.0)
    (tensors,) = series(1)
    first = PartWriter(store).persist(taken(1, tensors, 0, 2)).part
    assert not any(chunk.with_peer for chunk in first.chunks)
    PartWriter(store).persist(taken(1, tensors, 1, 2))
    for rank in (0, 1):
        assert_holds(store, first.id, tensors, rank)


# Failures


def test_a_save_that_is_given_up_leaves_nothing(store: Store) -> None:
    (tensors,) = series(1)
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(SaveFailed, match="given up, because not all ranks have a snapshot of it"):
        PartWriter(store).persist(taken(1, tensors), given_up)
    assert files_in(store.root) == []


def test_a_save_that_is_given_up_while_it_waits_for_another_rank_ends_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_ownership, "PATIENCE", 1e9)
    (tensors,) = series(1)
    given_up = threading.Event()
    failures: list[SaveFailed] = []

    def persist() -> None:
        try:
            PartWriter(store).persist(taken(1, tensors, 0, 2), given_up)
        except SaveFailed as error:
            failures.append(error)

    thread = threading.Thread(target=persist)
    thread.start()
    claim = store.directory(checkpoint_id(1, "a0")) / chunk_ownership.claim_file(0)
    while not claim.exists():
        assert thread.is_alive()
    given_up.set()
    thread.join()
    assert "given up" in failures[0].message
    assert not [name for name in files_in(store.root) if name.startswith("rank-")]


def test_a_save_takes_no_longer_than_it_may(store: Store) -> None:
    tensors = list(series(2))
    one = PartWriter(store, SaveOptions(timeout=0))
    with pytest.raises(SaveFailed, match="not done within 0 s") as caught:
        one.persist(taken(1, tensors[0]))
    assert "training goes on" in caught.value.hint
    assert files_in(store.root) == []
    one.options = SaveOptions()
    assert_holds(store, one.persist(taken(2, tensors[1])).part.id, tensors[1])
