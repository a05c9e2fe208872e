"""A real saver process, and what it does for ranks that live and ranks that die."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot, describe, from_slot, layout
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.protocol.saver_messages import Closed, Message
from autoglm_resume.protocol.shared_memory import Slots, room
from autoglm_resume.savers.directory_lock import settled
from tests.patience import PATIENCE

SIZE = 1 << 20


class Link:
    """A connection to a saver."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self.slots: Slots | None = None
        self.said: list[Any] = []
        """Events."""

    def send(self, **message: Any) -> None:
        saver_messages.send(self.socket, message)

    def receive(self) -> Message:
        while True:
            found = saver_messages.receive(self.socket, wait=True)
            assert found is not None
            message, fd = found
            if message["op"] != "said":
                break
            self.said.append(message["event"])
        if fd is not None:
            self.slots = Slots(fd, message["bytes"], message["count"])
        return message

    def ask(self, **message: Any) -> Message:
        self.send(**message)
        return self.receive()

    def holding(self) -> list[str]:
        """As the supervisor asks it."""
        answer = self.ask(op="holding", question=1)
        assert (answer["op"], answer["question"]) == ("holding", 1)
        ids: list[str] = answer["ids"]
        return ids

    def finish(self, *ids: str) -> None:
        assert self.ask(op="finish", ids=ids, question=2) == {"op": "idle", "question": 2}

    def claim(self) -> Message | None:
        answer = self.ask(op="claim", question=3)
        assert (answer["op"], answer["question"]) == ("claim", 3)
        claim: Message | None = answer["claim"]
        return claim

    def events(self, kind: str) -> list[Any]:
        """What the saver has said so far, to its supervisor."""
        self.socket.settimeout(0)
        with contextlib.suppress(Closed):
            while found := saver_messages.receive(self.socket, wait=False):
                assert found[0]["op"] == "said"
                self.said.append(found[0]["event"])
        self.socket.settimeout(PATIENCE)
        return [event for event in self.said if event["event"] == kind]

    def put(self, snapshot: Snapshot, slot: int) -> None:
        """Into a slot, and hand it over."""
        assert self.slots is not None
        view = self.slots.view(slot)
        offsets, at = layout(len(tensor.data) for tensor in snapshot.tensors)
        for offset, tensor in zip(offsets, snapshot.tensors, strict=True):
            view[offset : offset + len(tensor.data)] = tensor.data
        text = describe(snapshot)
        view[at : at + len(text)] = text
        self.send(
            op="persist",
            id=snapshot.id,
            slot=slot,
            at=at,
            length=len(text),
            began=0.0,
            blocked=0.0,
        )


class Place:
    """Where a saver saves, and its process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store(directory / "ckpt")
        self.log = directory / "saver.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.name = f"autoglm-test-{os.getpid()}-{directory.name}"

    def start(self, *, listening: bool = False) -> tuple[Link, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        more = [str(os.getpid()), self.name] if listening else []
        with theirs, self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "autoglm_resume.savers.saver_process"),
                    *(str(theirs.fileno()), *more),
                ],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return Link(ours), process

    def connect(self) -> Link:
        """As a rank does it."""
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                link.connect(saver_messages.address(self.name))
            except ConnectionRefusedError:
                link.close()
                assert psutil.Process(self.processes[-1].pid).status() != "zombie"
            else:
                return Link(link)

    def hello(
        self, link: Link, world_size: int = 1, resume: str | None = None, **how: Any
    ) -> Message:
        checkpoint = Checkpointing(str(self.store.root), **how)
        return link.ask(
            op="hello",
            rank=0,
            world_size=world_size,
            checkpoint=asdict(checkpoint),
            resume=resume,
        )

    def held(self, step: int) -> dict[str, torch.Tensor]:
        return restore.read(self.store, self.store.directory(id_of(step)), 0).states["m"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    assert not made.log.exists() or made.log.read_text() == ""


def in_a_child(work: Callable[[], object]) -> int:
    """Exit code of a process that does `work`: 1 if it raises, minus the signal it died by."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def id_of(step: int) -> str:
    return checkpoint_id(step, "a0")


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(step)), "n": torch.arange(step)}


def taken(step: int, world_size: int = 1, **identity: Any) -> Snapshot:
    return capture.take(
        {"m": state(step)}, id=id_of(step), rank=0, world_size=world_size, **identity
    )


def equal(found: dict[str, torch.Tensor], step: int) -> bool:
    return all(torch.equal(found[name], value) for name, value in state(step).items())


def test_a_snapshot_that_is_handed_over_is_committed_and_told(place: Place) -> None:
    owner, _ = place.start(listening=True)
    link = place.connect()
    nothing = {"op": "hello", "held": None, "persisting": None, "bytes": 0, "count": 0}
    assert place.hello(link) == nothing
    there = link.ask(op="slots", bytes=SIZE, count=2)
    assert (there["bytes"], there["count"], there["reason"]) == (SIZE, 2, "")
    for step in (1, 2, 3):
        link.put(taken(step), step % 2)
        assert link.receive() == {"op": "saved", "id": id_of(step), "ok": True, "reason": ""}
    assert all(equal(place.held(step), step) for step in (1, 2, 3))
    assert [event["step"] for event in owner.events("committed")] == [1, 2, 3]
    saved = owner.events("saved")[-1]
    part = place.store.load_part(place.store.directory(id_of(3)), 0)
    assert [saved[key] for key in ("raw", "stored", "shared")] == [
        part.raw,
        part.stored,
        part.shared,
    ]


def test_it_works_when_nothing_else_does_and_does_not_heed_ctrl_c(place: Place) -> None:
    link, process = place.start()
    place.hello(link)
    assert psutil.Process(process.pid).nice() == 19
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert place.hello(link)["op"] == "hello"
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_the_next_rank_finds_the_snapshot_of_the_one_that_died(place: Place) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    for step in (1, 2):
        rank.put(taken(step), step % 2)
        assert rank.receive()["ok"]
    rank.socket.close()
    successor = place.connect()
    held = place.hello(successor, resume=id_of(2))["held"]
    assert (held["id"], held["slot"]) == (id_of(2), 0)
    assert successor.slots is not None
    slot = successor.slots.view(0)
    found = from_slot(bytes(slot[held["at"] : held["at"] + held["length"]]), slot)
    path = place.store.directory(id_of(2))
    assert equal(restore.read(place.store, path, 0, memory=found).states["m"], 2)
    same = successor.ask(op="slots", bytes=SIZE // 2, count=2)
    assert same["bytes"] == SIZE, "slots that are large enough are kept, with what is in them"
    assert place.hello(successor)["held"] is not None
    successor.ask(op="slots", bytes=2 * SIZE, count=2)
    assert place.hello(successor)["held"] is None
    owner.socket.close()


def test_what_a_rank_hands_over_with_its_last_breath_is_persisted(place: Place) -> None:
    owner, process = place.start(listening=True)
    snapshot = taken(7)

    def rank() -> None:
        link = place.connect()
        place.hello(link)
        link.ask(op="slots", bytes=SIZE, count=2)
        os.kill(process.pid, signal.SIGSTOP)  # it gets to know of the snapshot after the death
        link.put(snapshot, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(rank) == -signal.SIGKILL
    owner.send(op="holding", question=1)
    process.send_signal(signal.SIGCONT)
    assert owner.receive()["ids"] == [id_of(7)]
    owner.finish(id_of(7))
    assert equal(place.held(7), 7)


def test_a_snapshot_that_another_rank_lacks_is_given_up(place: Place) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank, world_size=2)
    rank.ask(op="slots", bytes=SIZE, count=2)
    rank.put(taken(3, world_size=2), 0)
    assert owner.holding() == [id_of(3)], "it waits for the other rank's claims"
    owner.finish()
    answer = rank.receive()
    assert not answer["ok"]
    assert "given up" in answer["reason"]
    assert not list(place.store.root.rglob("rank-*"))
    rank.put(taken(4), 1)
    assert rank.receive()["ok"], "the next one is not"
    assert owner.events("save_failed") == [], "who gives it up says so"


def test_a_saver_that_does_nothing_says_so_at_once(place: Place) -> None:
    owner, _ = place.start()
    assert owner.holding() == []
    owner.finish()


def test_it_ends_with_its_owner_but_not_before_the_last_save(place: Place) -> None:
    link, process = place.start()
    place.hello(link)
    link.ask(op="slots", bytes=SIZE, count=1)
    link.put(taken(1), 0)
    link.socket.close()
    assert process.wait(PATIENCE) == 0
    assert equal(place.held(1), 1)


def test_it_dies_with_its_supervisor(place: Place) -> None:
    told, tell = os.pipe()

    def supervisor() -> None:
        own = Place(place.directory)
        _, process = own.start(listening=True)
        own.hello(own.connect())
        os.write(tell, str(process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(supervisor) == -signal.SIGKILL
    saver = int(os.read(told, 9))
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(saver).wait(PATIENCE)
    os.close(told)
    os.close(tell)


def test_too_little_memory_is_said_with_numbers_and_none_is_taken(place: Place) -> None:
    link, process = place.start()
    place.hello(link)
    size = 2 * room()
    there = link.ask(op="slots", bytes=size, count=2)
    assert (there["count"], there["bytes"]) == (0, 0)
    assert f"2 slots of {size:,} bytes were asked for" in there["reason"]
    assert link.slots is None
    assert psutil.Process(process.pid).memory_info().shared < 1 << 28
    assert link.ask(op="slots", bytes=SIZE, count=1)["count"] == 1


def test_no_file_is_left_in_shared_memory(place: Place) -> None:
    before = set(Path("/dev/shm").iterdir())
    link, process = place.start(listening=True)
    rank = place.connect()
    place.hello(rank)
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_listened_to(place: Place) -> None:
    owner, _ = place.start(listening=True)
    place.hello(place.connect())

    def somebody() -> None:
        os.setuid(65534)
        with pytest.raises(Closed):
            place.connect().ask(op="holding", question=1)

    assert in_a_child(somebody) == 0
    assert owner.holding() == []


def test_a_save_that_fails_is_told_with_its_reason_and_the_next_one_works(place: Place) -> None:
    owner, _ = place.start(listening=True)
    link = place.connect()
    place.hello(link)
    link.ask(op="slots", bytes=SIZE, count=2)
    (place.store.root / id_of(1)).parent.mkdir()
    (place.store.root / id_of(1)).touch()
    link.put(taken(1), 0)
    answer = link.receive()
    assert not answer["ok"]
    assert f"{id_of(1)}/rank-00000.pack: not saved: " in answer["reason"]
    assert owner.events("save_failed")[0]["reason"] == answer["reason"]
    link.put(taken(2), 1)
    assert link.receive()["ok"]


def test_what_no_rule_keeps_is_deleted_after_the_answer(place: Place) -> None:
    owner, _ = place.start(listening=True)
    link = place.connect()
    place.hello(link, keep=KeepRules(last=1), options=SaveOptions("off"))
    link.ask(op="slots", bytes=SIZE, count=2)
    for step in (1, 2, 3):
        link.put(taken(step, lineage=()), step % 2)
        assert link.receive()["ok"]
    owner.finish()
    assert [path.name for path in place.store.committed()] == [id_of(3)]
    assert [event["id"] for event in owner.events("pruned")] == [id_of(1), id_of(2)]


def test_the_next_part_refers_to_the_one_that_the_run_resumed_from(place: Place) -> None:
    tensors = {"w": torch.randn(1000)}
    first = capture.take({"m": tensors}, id=id_of(1), rank=0, world_size=1)
    for resume, expected in ((None, ()), (id_of(1), (id_of(1),))):
        link, _ = place.start()
        place.hello(link, resume=resume)
        link.ask(op="slots", bytes=SIZE, count=2)
        step = 1 if resume is None else 2
        link.put(first if step == 1 else capture.take(
            {"m": tensors}, id=id_of(2), rank=0, world_size=1), 0)  # fmt: skip
        assert link.receive()["ok"]
        part = place.store.load_part(place.store.directory(id_of(step)), 0)
        assert part.needs == expected


def test_many_ranks_may_come_and_go(place: Place) -> None:
    owner, _ = place.start(listening=True)
    answers: list[Message] = []
    work: Callable[[], None] = lambda: answers.append(place.hello(place.connect()))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert owner.holding() == []


def test_ranks_of_the_next_attempt_need_not_wait_until_the_last_snapshot_is_written(
    place: Place,
) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank, world_size=2)
    rank.ask(op="slots", bytes=SIZE, count=2)
    snapshot = taken(3, world_size=2)
    rank.put(snapshot, 0)  # its saver waits for the other rank's now
    rank.socket.close()
    assert owner.holding() == [id_of(3)]
    claim = owner.claim()
    assert claim is not None
    assert (claim["id"], claim["raw"], claim["world_size"]) == (id_of(3), snapshot.nbytes, 2)
    successor = place.connect()
    hello = place.hello(successor, world_size=2, resume=id_of(3))
    held = hello["held"]
    assert (held["id"], hello["persisting"]) == (id_of(3), id_of(3))
    assert successor.slots is not None
    slot = successor.slots.view(held["slot"])
    found = from_slot(bytes(slot[held["at"] : held["at"] + held["length"]]), slot)
    assert equal(restore.read_sealed(found, claim["seal"]).states["m"], 3)
    owner.finish()
    answer = successor.receive()
    assert (answer["op"], answer["id"], answer["ok"]) == ("saved", id_of(3), False)


def test_a_snapshot_is_claimed_when_its_storage_fails(place: Place) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    (place.store.root / id_of(1)).parent.mkdir()
    (place.store.root / id_of(1)).touch()
    rank.put(taken(1), 0)
    assert not rank.receive()["ok"]
    assert owner.holding() == []
    claim = owner.claim()
    assert claim is not None
    assert claim["id"] == id_of(1)


def test_the_only_slot_is_never_claimed_since_the_next_snapshot_overwrites_it(
    place: Place,
) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=1)
    rank.put(taken(1), 0)
    assert owner.claim() is None
    assert rank.receive()["ok"]
    assert owner.claim() is None


def test_a_long_message_is_understood(place: Place) -> None:
    link, _ = place.start()
    rename = {f"layer.{number}.weight": f"block.{number}.weight" for number in range(2000)}
    assert place.hello(link, rename=rename)["op"] == "hello"


def test_a_save_is_tried_again_while_the_saver_still_tidies_up_after_the_first_try(
    place: Place,
) -> None:
    for step in range(1, 40):
        PartWriter(place.store).persist(taken(step))
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank, keep=KeepRules(last=1))
    rank.ask(op="slots", bytes=SIZE, count=2)
    (place.store.root / id_of(50)).touch()
    rank.put(taken(50), 0)
    first = rank.receive()
    assert not first["ok"]
    rank.put(taken(50), 1)
    second = rank.receive()
    assert not second["ok"]
    assert "File exists" in second["reason"], "as the first time"
    (place.store.root / id_of(50)).unlink()
    rank.put(taken(50), 0)
    assert rank.receive()["ok"]
    owner.finish(id_of(50))
    assert equal(place.held(50), 50)


def test_a_snapshot_that_was_given_up_and_overwritten_is_never_stored(place: Place) -> None:
    link, _ = place.start()
    place.hello(link)
    link.ask(op="slots", bytes=SIZE, count=2)
    place.store.root.mkdir()
    with settled(place.store.root):  # the saver waits, as it would for a file server
        link.put(taken(1), 0)
        link.send(op="give_up", id=id_of(1))
        link.put(taken(2), 0)
    answers = [link.receive(), link.receive()]
    assert [(answer["id"], answer["ok"]) for answer in answers] == [
        (id_of(1), False),
        (id_of(2), True),
    ]
    assert "given up" in answers[0]["reason"]
    assert [path.name for path in place.store.committed()] == [id_of(2)]


def test_what_a_rank_sent_counts_even_if_it_died_before_it_read_everything() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    saver_messages.send(ours, {"op": "slots"})
    saver_messages.send(theirs, {"op": "persist"})
    saver_messages.send(theirs, {"op": "persist again"})
    theirs.close()
    assert saver_messages.receive(ours, wait=False) == ({"op": "persist"}, None)
    assert saver_messages.receive(ours, wait=True) == ({"op": "persist again"}, None)
    with pytest.raises(Closed):
        saver_messages.receive(ours, wait=True)
    ours.close()


def test_a_saver_leaves_the_processors_to_ranks_that_start_until_they_have(place: Place) -> None:
    owner, _ = place.start(listening=True)
    rank = place.connect()
    place.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    owner.send(op="rest")
    assert owner.holding() == [], "it has heard that"
    rank.put(taken(1), 0)
    assert owner.holding() == [id_of(1)]
    assert owner.claim() is not None, "sealed all the same"
    assert not place.store.committed()
    owner.send(op="work_on")
    assert rank.receive()["ok"]
    owner.send(op="rest")
    assert owner.holding() == []
    rank.put(taken(2), 1)
    assert owner.holding() == [id_of(2)]
    owner.finish(id_of(2))
    assert equal(place.held(2), 2)
