"""A real saver process: ranks that come, live and die, and its own life."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from autoglm_resume.checkpoint.format.snapshot import from_slot
from autoglm_resume.checkpoint.state import restore
from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.saver_messages import Closed, Message
from tests.patience import PATIENCE
from tests.savers.saver import (
    SIZE,
    SaverHome,
    equal,
    id_of,
    in_a_child,
    taken,
)


def test_it_works_when_nothing_else_does_and_does_not_heed_ctrl_c(home: SaverHome) -> None:
    link, process = home.start()
    home.hello(link)
    assert psutil.Process(process.pid).nice() == 19
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert home.hello(link)["op"] == "hello"
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_the_next_rank_finds_the_snapshot_of_the_one_that_died(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank)
    rank.ask(op="slots", bytes=SIZE, count=2)
    for step in (1, 2):
        rank.put(taken(step), step % 2)
        assert rank.receive()["ok"]
    rank.socket.close()
    successor = home.connect()
    held = home.hello(successor, resume=id_of(2))["held"]
    assert (held["id"], held["slot"]) == (id_of(2), 0)
    assert successor.slots is not None
    slot = successor.slots.view(0)
    found = from_slot(bytes(slot[held["at"] : held["at"] + held["length"]]), slot)
    path = home.store.directory(id_of(2))
    assert equal(restore.read(home.store, path, 0, memory=found).states["m"], 2)
    same = successor.ask(op="slots", bytes=SIZE // 2, count=2)
    assert same["bytes"] == SIZE, "slots that are large enough are kept, with what is in them"
    assert home.hello(successor)["held"] is not None
    successor.ask(op="slots", bytes=2 * SIZE, count=2)
    assert home.hello(successor)["held"] is None
    owner.socket.close()


def test_what_a_rank_hands_over_with_its_last_breath_is_persisted(home: SaverHome) -> None:
    owner, process = home.start(listening=True)
    snapshot = taken(7)

    def rank() -> None:
        link = home.connect()
        home.hello(link)
        link.ask(op="slots", bytes=SIZE, count=2)
        os.kill(process.pid, signal.SIGSTOP)  # it gets to know of the snapshot after the death
        link.put(snapshot, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(rank) == -signal.SIGKILL
    owner.send(op="holding", question=1)
    process.send_signal(signal.SIGCONT)
    assert owner.receive()["ids"] == [id_of(7)]
    owner.finish(id_of(7))
    assert equal(home.held(7), 7)


def test_a_saver_that_does_nothing_says_so_at_once(home: SaverHome) -> None:
    owner, _ = home.start()
    assert owner.holding() == []
    owner.finish()


def test_it_ends_with_its_owner_but_not_before_the_last_save(home: SaverHome) -> None:
    link, process = home.start()
    home.hello(link)
    link.ask(op="slots", bytes=SIZE, count=1)
    link.put(taken(1), 0)
    link.socket.close()
    assert process.wait(PATIENCE) == 0
    assert equal(home.held(1), 1)


def test_it_dies_with_its_supervisor(home: SaverHome) -> None:
    told, tell = os.pipe()

    def supervisor() -> None:
        own = SaverHome(home.directory)
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_listened_to(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    home.hello(home.connect())

    def somebody() -> None:
        os.setuid(65534)
        with pytest.raises(Closed):
            home.connect().ask(op="holding", question=1)

    assert in_a_child(somebody) == 0
    assert owner.holding() == []


def test_many_ranks_may_come_and_go(home: SaverHome) -> None:
    owner, _ = home.start(listening=True)
    answers: list[Message] = []
    work: Callable[[], None] = lambda: answers.append(home.hello(home.connect()))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert owner.holding() == []


def test_ranks_of_the_next_attempt_need_not_wait_until_the_last_snapshot_is_written(
    home: SaverHome,
) -> None:
    owner, _ = home.start(listening=True)
    rank = home.connect()
    home.hello(rank, world_size=2)
    rank.ask(op="slots", bytes=SIZE, count=2)
    snapshot = taken(3, world_size=2)
    rank.put(snapshot, 0)  # its saver waits for the other rank's now
    rank.socket.close()
    assert owner.holding() == [id_of(3)]
    sealed = owner.sealed()
    assert sealed is not None
    assert (sealed["id"], sealed["raw"], sealed["world_size"]) == (id_of(3), snapshot.nbytes, 2)
    successor = home.connect()
    hello = home.hello(successor, world_size=2, resume=id_of(3))
    held = hello["held"]
    assert (held["id"], hello["persisting"]) == (id_of(3), id_of(3))
    assert successor.slots is not None
    slot = successor.slots.view(held["slot"])
    found = from_slot(bytes(slot[held["at"] : held["at"] + held["length"]]), slot)
    assert equal(restore.read_sealed(found, sealed["seal"]).states["m"], 3)
    owner.finish()
    answer = successor.receive()
    assert (answer["op"], answer["id"], answer["ok"]) == ("saved", id_of(3), False)


def test_a_long_message_is_understood(home: SaverHome) -> None:
    link, _ = home.start()
    rename = {f"layer.{number}.weight": f"block.{number}.weight" for number in range(2000)}
    assert home.hello(link, rename=rename)["op"] == "hello"


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
