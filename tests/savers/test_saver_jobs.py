"""What a real saver does with the snapshots that it is handed."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.protocol.saver_messages import Closed
from autoglm_resume.protocol.shared_memory import room
from autoglm_resume.savers.directory_lock import settled
from tests.savers.saver import (
    SIZE,
    SaverHome,
    equal,
    id_of,
    taken,
)


def test_a_snapshot_that_is_handed_over_is_committed_and_told(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    link = home.connect()
    nothing = {"op": "hello", "held": None, "persisting": None, "bytes": 0, "count": 0}
    assert home.hello(link) == nothing
    there = link.ask(op="slots", bytes=SIZE, count=2)
    assert (there["bytes"], there["count"], there["reason"]) == (SIZE, 2, "")
    for step in (1, 2, 3):
        link.put(taken(step), step % 2)
        assert link.receive() == {"op": "saved", "id": id_of(step), "ok": True, "reason": ""}
    assert all(equal(home.held(step), step) for step in (1, 2, 3))
    assert [event["step"] for event in owner.events("committed")] == [1, 2, 3]
    saved = owner.events("saved")[-1]
    part = home.store.load_part(home.store.directory(id_of(3)), 0)
    assert [saved[key] for key in ("raw", "stored", "shared")] == [
        part.raw,
        part.stored,
        part.shared,
    ]


def test_a_snapshot_that_another_rank_lacks_is_given_up(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank, world_size=2)
    rank.ask(op="slots", bytes=SIZE, count=2)
    rank.put(taken(3, world_size=2), 0)
    assert owner.holding() == [id_of(3)], "it waits for the other rank's claims"
    owner.finish()
    answer = rank.receive()
    assert not answer["ok"]
    assert "given up" in answer["reason"]
    assert not list(home.store.root.rglob("rank-*"))
    rank.put(taken(4), 1)
    assert rank.receive()["ok"], "the next one is not"
    assert owner.events("save_failed") == [], "who gives it up says so"


def test_too_little_memory_is_said_with_numbers_and_none_is_taken(home: SaverHome) -> None:
    link, process = home.start()
    home.hello(link)
    size = 2 * room()
    there = link.ask(op="slots", bytes=size, count=2)
    assert (there["count"], there["bytes"]) == (0, 0)
    assert f"2 slots of {size:,} bytes were asked for" in there["reason"]
    assert link.slots is None
    assert psutil.Process(process.pid).memory_info().shared < 1 << 28
    assert link.ask(op="slots", bytes=SIZE, count=1)["count"] == 1


def test_no_file_is_left_in_shared_memory(home: SaverHome) -> None:
    before = set(Path("/dev/shm").iterdir())
    link, process = home.start(listening=True)
    rank = home.connect()
    home.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    assert set(Path("/dev/shm").iterdir()) == before
    process.kill()
    process.wait()
    assert set(Path("/dev/shm").iterdir()) == before
    assert rank.slots is not None
    rank.slots.view(0)[:2] = b"ok"  # the rank can still write, to nobody
    with pytest.raises(Closed):
        rank.ask(op="holding", question=1)
    link.socket.close()


def test_a_save_that_fails_is_told_with_its_reason_and_the_next_one_works(
    home: SaverHome,
) -> None:
    owner, _ = home.start(listening=True)
    link = home.connect()
    home.hello(link)
    link.ask(op="slots", bytes=SIZE, count=2)
    (home.store.root / id_of(1)).parent.mkdir()
    (home.store.root / id_of(1)).touch()
    link.put(taken(1), 0)
    answer = link.receive()
    assert not answer["ok"]
    assert f"{id_of(1)}/rank-00000.pack: not saved: " in answer["reason"]
    assert owner.events("save_failed")[0]["reason"] == answer["reason"]
    link.put(taken(2), 1)
    assert link.receive()["ok"]


def test_what_no_rule_keeps_is_deleted_after_the_answer(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    link = home.connect()
    home.hello(link, keep=KeepRules(last=1), options=SaveOptions("off"))
    link.ask(op="slots", bytes=SIZE, count=2)
    for step in (1, 2, 3):
        link.put(taken(step, lineage=()), step % 2)
        assert link.receive()["ok"]
    owner.finish()
    assert [path.name for path in home.store.committed()] == [id_of(3)]
    assert [event["id"] for event in owner.events("pruned")] == [id_of(1), id_of(2)]


def test_the_next_part_refers_to_the_one_that_the_run_resumed_from(home: SaverHome) -> None:
    tensors = {"w": torch.randn(1000)}
    first = capture.take({"m": tensors}, id=id_of(1), rank=0, world_size=1)
    for resume, expected in ((None, ()), (id_of(1), (id_of(1),))):
        link, _ = home.start()
        home.hello(link, resume=resume)
        link.ask(op="slots", bytes=SIZE, count=2)
        step = 1 if resume is None else 2
        link.put(first if step == 1 else capture.take(
            {"m": tensors}, id=id_of(2), rank=0, world_size=1), 0)  # fmt: skip
        assert link.receive()["ok"]
        part = home.store.load_part(home.store.directory(id_of(step)), 0)
        assert part.needs == expected


def test_a_snapshot_is_sealed_when_its_storage_fails(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    (home.store.root / id_of(1)).parent.mkdir()
    (home.store.root / id_of(1)).touch()
    rank.put(taken(1), 0)
    assert not rank.receive()["ok"]
    assert owner.holding() == []
    sealed = owner.sealed()
    assert sealed is not None
    assert sealed["id"] == id_of(1)


def test_the_only_slot_is_never_sealed_since_the_next_snapshot_overwrites_it(
    home: SaverHome,
) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=1)
    rank.put(taken(1), 0)
    assert owner.sealed() is None
    assert rank.receive()["ok"]
    assert owner.sealed() is None


def test_a_save_is_tried_again_while_the_saver_still_tidies_up_after_the_first_try(
    home: SaverHome,
) -> None:
    for step in range(1, 40):
        PartWriter(home.store).persist(taken(step))
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank, keep=KeepRules(last=1))
    rank.ask(op="slots", bytes=SIZE, count=2)
    (home.store.root / id_of(50)).touch()
    rank.put(taken(50), 0)
    first = rank.receive()
    assert not first["ok"]
    rank.put(taken(50), 1)
    second = rank.receive()
    assert not second["ok"]
    assert "File exists" in second["reason"], "as the first time"
    (home.store.root / id_of(50)).unlink()
    rank.put(taken(50), 0)
    assert rank.receive()["ok"]
    owner.finish(id_of(50))
    assert equal(home.held(50), 50)


def test_a_snapshot_that_was_given_up_and_overwritten_is_never_stored(home: SaverHome) -> None:
    link, _ = home.start()
    home.hello(link)
    link.ask(op="slots", bytes=SIZE, count=2)
    home.store.root.mkdir()
    with settled(home.store.root):  # the saver waits, as it would for a file server
        link.put(taken(1), 0)
        link.send(op="give_up", id=id_of(1))
        link.put(taken(2), 0)
    answers = [link.receive(), link.receive()]
    assert [(answer["id"], answer["ok"]) for answer in answers] == [
        (id_of(1), False),
        (id_of(2), True),
    ]
    assert "given up" in answers[0]["reason"]
    assert [path.name for path in home.store.committed()] == [id_of(2)]


def test_a_saver_leaves_the_processors_to_ranks_that_start_until_they_have(
    home: SaverHome,
) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    owner.send(op="rest")
    assert owner.holding() == [], "it has heard that"
    rank.put(taken(1), 0)
    assert owner.holding() == [id_of(1)]
    assert owner.sealed() is not None, "sealed all the same"
    assert not home.store.committed()
    owner.send(op="work_on")
    assert rank.receive()["ok"]
    owner.send(op="rest")
    assert owner.holding() == []
    rank.put(taken(2), 1)
    assert owner.holding() == [id_of(2)]
    owner.finish(id_of(2))
    assert equal(home.held(2), 2)
