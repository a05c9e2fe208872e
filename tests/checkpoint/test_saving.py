"""Savers over a series of checkpoints: what they share, and what becomes of failures."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.chunks import direct_io
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store import retention
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.retention import KeepRules, RetentionEntry
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import chunk_ownership, pack_writer, part_writer
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.errors import CorruptCheckpoint

Tensors = dict[str, torch.Tensor]
SMALL = SaveOptions("small", keyframe_every=3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt")


def series(length: int, seed: int = 0) -> Iterator[Tensors]:
    """A training in miniature: weights that drift, moments that do not stay, what is frozen, a
    bf16 copy, a target network that follows, and a tensor of several chunks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, frozen, target = random(300, 1000), random(50_000), torch.zeros(300, 1000)
    for step in range(length):
        yield {
            "weight": weight,
            "moment": random(40_000),
            "frozen": frozen,
            "half": weight.bfloat16(),
            "target": target,
            "step": torch.tensor(step),
            "none": torch.zeros(0),
        }
        if step % 2:
            target = weight
        weight = weight * (1 + 1e-6 * random(300, 1000))


def taken(step: int, tensors: Tensors, rank: int = 0, ranks: int = 1, **identity: Any) -> Snapshot:
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    id = checkpoint_id(step, "a0")
    return capture.take({"m": own}, id=id, rank=rank, world_size=ranks, **identity)


def files_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def assert_holds(store: Store, id: str, expected: Tensors, rank: int = 0) -> None:
    back = restore.read(store, store.directory(id), rank).states["m"]
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)


# A series


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


class Flushing:
    """os.fdatasync that goes wrong `times` times."""

    def __init__(self, times: int, error: int) -> None:
        self.times, self.error = times, error
        self.real: Callable[[int], None] = os.fdatasync

    def __call__(self, fd: int) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.error, os.strerror(self.error))
        self.real(fd)


@pytest.mark.parametrize("times", [1, 2])
def test_an_error_that_passes_costs_only_another_try(
    store: Store, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (0.0, 0.0))
    monkeypatch.setattr(os, "fdatasync", Flushing(times, errno.EIO))
    (tensors,) = series(1)
    assert_holds(store, PartWriter(store).persist(taken(1, tensors)).part.id, tensors)


@pytest.mark.parametrize(("error", "tries"), [(errno.EIO, 3), (errno.ENOSPC, 1), (errno.EACCES, 1)])
def test_one_that_stays_is_reported_and_one_that_cannot_pass_is_not_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: int, tries: int
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (0.0, 0.0))
    flushing = Flushing(100, error)
    monkeypatch.setattr(os, "fdatasync", flushing)
    first, second = series(2)
    with pytest.raises(SaveFailed, match=os.strerror(error)) as caught:
        PartWriter(store).persist(taken(1, first))
    assert "rank-00000.pack: not saved" in caught.value.message
    assert flushing.times == 100 - tries
    assert files_in(store.root) == []
    monkeypatch.undo()
    assert_holds(store, PartWriter(store).persist(taken(2, second)).part.id, second)


def test_nobody_waits_for_another_try_of_a_save_that_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (1e9,))
    given_up = threading.Event()

    def flush(fd: int) -> None:
        given_up.set()
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(os, "fdatasync", flush)
    with pytest.raises(SaveFailed):
        PartWriter(store).persist(taken(1, next(series(1))), given_up)


class Lying:
    """os.fdatasync of a disk that changes byte `place` of the `number`th file flushed."""

    def __init__(self, place: int) -> None:
        self.place, self.done = place, False
        self.real: Callable[[int], None] = os.fdatasync

    def __call__(self, fd: int) -> None:
        self.real(fd)
        if not self.done and os.fstat(fd).st_size > self.place:
            self.done = True
            with Path(f"/proc/self/fd/{fd}").open("r+b") as file:
                file.seek(self.place)
                byte = file.read(1)
                file.seek(self.place)
                file.write(bytes([byte[0] ^ 16]))


@pytest.mark.parametrize("compress", ["off", "fast", "small"])
@pytest.mark.parametrize("place", [0, 300_000, 700_000])
def test_a_disk_that_gives_back_other_bytes_is_found_out_before_the_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch, compress: Any, place: int
) -> None:
    monkeypatch.setattr(pack_writer, "WINDOW_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 16 * direct_io.BLOCK)
    old, new, newer = series(3)
    one = PartWriter(store, SaveOptions(compress))
    before = one.persist(taken(1, old)).part
    if compress == "small":
        place //= 8  # what follows is smaller
    lying = Lying(place)
    monkeypatch.setattr(os, "fdatasync", lying)
    with pytest.raises(SaveFailed, match="reading it back: "):
        one.persist(taken(2, new))
    assert lying.done
    assert store.latest() == store.directory(before.id)
    assert_holds(store, one.persist(taken(3, newer)).part.id, newer)


def test_chunks_of_all_tensors_are_in_their_order() -> None:
    tensors = {
        "a": torch.zeros(CHUNK_BYTES // 4 * 2 + 1),
        "empty": torch.zeros(0),
        "b": torch.ones(3),
    }
    items = pack_writer.items_of(taken(1, tensors))
    assert [(i.tensor, i.index, len(i.raw)) for i in items] == [
        ("m/a", 0, CHUNK_BYTES),
        ("m/a", 1, CHUNK_BYTES),
        ("m/a", 2, 4),
        ("m/b", 0, 12),
    ]
    assert items[0].named().name == items[1].named().name != items[2].named().name
    assert len(set(itertools.chain.from_iterable(i.raw for i in items[:2]))) == 1
