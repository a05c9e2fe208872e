"""Real savers of several ranks, and real connections to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import describe, layout
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import chunk_ownership
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.events import Event
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.services import savers as module
from autoglm_resume.supervise.services.savers import Savers
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.saving.saver_client import NoSaver, SaverClient
from tests.lines import line
from tests.patience import soon

RANKS = 2


class Run:
    """The savers of a run, and what they told."""

    def __init__(self, directory: Path, loop: EventLoop) -> None:
        self.directory, self.loop = directory, loop
        self.store = Store(directory / "ckpt")
        self.log = directory / "savers.log"
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.heard: list[Event] = []
        self.savers = Savers(
            loop,
            dict(os.environ),
            f"test-{directory.name}",
            RANKS,
            self.log,
            lambda event: self.told.append(line(event)),
            lambda rank, event: self.heard.append(event),
        )

    def rank(self, number: int) -> SaverClient:
        """As a rank of the next attempt has it, connected."""
        checkpoint = Checkpointing(str(self.store.root))
        settings = Settings(number, RANKS, checkpoint, None, True, (), "a0", None)
        client = SaverClient(settings, self.savers.names[number])
        client.hello()
        client.send({"op": "slots", "bytes": 1 << 20, "count": 2})
        while client.slots is None:
            client.receive(1.0)
        return client

    def settle(self, timeout: float = 60, hurried: Callable[[], bool] = lambda: False) -> None:
        self.savers.settle(self.store, timeout, hurried)

    def wait_for(self, event: str) -> dict[str, Any]:
        assert self.loop.wait(lambda: event in dict(self.told), soon())
        return dict(self.told)[event]

    def events(self, rank: int, kind: str) -> list[Event]:
        return [e for e in self.heard if (e.rank, e.event) == (rank, kind)]

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in sorted(self.savers.pids)]


@pytest.fixture
def run(tmp_path: Path, loop: EventLoop) -> Iterator[Run]:
    made = Run(tmp_path, loop)
    yield made
    made.savers.close()
    assert made.log.read_text() == ""


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(step))}


def id_of(step: int) -> str:
    return checkpoint_id(step, "a0")


def hand_over(client: SaverClient, rank: int, step: int) -> None:
    """A snapshot, and then the rank is dead."""
    taken = capture.take({"m": state(step)}, id=id_of(step), rank=rank, world_size=RANKS)
    assert client.slots is not None
    slot = client.slots.view(0)
    _, at = layout(len(tensor.data) for tensor in taken.tensors)
    for tensor in taken.tensors:
        slot[: len(tensor.data)] = tensor.data
    text = describe(taken)
    slot[at : at + len(text)] = text
    client.send(
        {
            "op": "persist",
            "id": taken.id,
            "slot": 0,
            "at": at,
            "length": len(text),
            "began": 0.0,
            "blocked": 0.0,
        }
    )
    client.close()


def test_what_every_rank_has_handed_over_is_committed_when_they_are_settled(run: Run) -> None:
    for rank in range(RANKS):
        hand_over(run.rank(rank), rank, 5)
    run.settle()
    assert [path.name for path in run.store.committed()] == [id_of(5)]
    for rank in range(RANKS):
        found = restore.read(run.store, run.store.directory(id_of(5)), rank).states["m"]
        assert torch.equal(found["w"], state(5)["w"])


def test_what_all_have_in_memory_can_be_resumed_from_before_it_is_written(run: Run) -> None:
    for rank in range(RANKS):
        hand_over(run.rank(rank), rank, 5)
    sealed = run.savers.settle(run.store, 60, lambda: False, lambda id: True)
    assert sealed is not None
    assert (sealed.id, sealed.step, len(sealed.seals)) == (id_of(5), 5, RANKS)
    assert sealed.raw == RANKS * 4000
    run.settle()
    assert [path.name for path in run.store.committed()] == [id_of(5)], "it was not forgotten"
    assert getattr(run.events(0, "saved")[0], "step", None) == 5


def test_what_one_rank_does_not_have_is_not_resumed_from(run: Run) -> None:
    run.rank(1).close()
    hand_over(run.rank(0), 0, 5)
    assert run.savers.settle(run.store, 60, lambda: False, lambda id: True) is None
    assert run.store.committed() == []


def test_ranks_that_have_different_snapshots_resume_from_storage(run: Run) -> None:
    for rank in range(RANKS):
        hand_over(run.rank(rank), rank, 5)
    run.settle()
    hand_over(run.rank(0), 0, 7)
    assert run.savers.settle(run.store, 60, lambda: False, lambda id: True) is None
    assert [path.name for path in run.store.committed()] == [id_of(5)]


def test_what_one_rank_lacks_is_given_up_without_a_wait_for_it(run: Run) -> None:
    run.rank(1).close()
    hand_over(run.rank(0), 0, 5)
    run.settle()
    assert run.store.committed() == []
    assert not list(run.store.root.rglob("rank-*"))
    (cut_off,) = run.told
    assert cut_off == ("save_cut_off", {"id": id_of(5), "step": 5, "missing": [1]})
    assert run.heard == [], "no rank failed to save"


def test_a_part_that_is_on_storage_already_counts(run: Run) -> None:
    taken = capture.take({"m": state(5)}, id=id_of(5), rank=0, world_size=RANKS)
    PartWriter(run.store, share=False).persist(taken)
    chunk_ownership.publish(run.store.directory(id_of(5)), 0, {})
    hand_over(run.rank(1), 1, 5)
    run.settle()
    assert [path.name for path in run.store.committed()] == [id_of(5)]


def test_with_nothing_under_way_settling_asks_and_that_is_all(run: Run) -> None:
    run.settle()
    assert run.told == []
    assert not run.store.root.exists()


def test_a_saver_that_dies_is_replaced_under_its_name_and_that_is_told(run: Run) -> None:
    client = run.rank(1)
    before = run.savers.pids
    (killed,) = [
        process for process in run.processes() if process.cmdline()[-1] == run.savers.names[1]
    ]
    killed.kill()
    lost = run.wait_for("saver_lost")
    assert (lost["rank"], lost["pid"], lost["code"]) == (1, killed.pid, -signal.SIGKILL)
    assert len(run.savers.pids - before) == 1
    with pytest.raises(NoSaver, match="died"):
        client.receive(60)
    assert client.slots is None
    again = run.rank(1)
    hand_over(again, 1, 7)
    hand_over(run.rank(0), 0, 7)
    run.settle()
    assert [path.name for path in run.store.committed()] == [id_of(7)]


def test_a_saver_that_dies_with_a_snapshot_costs_that_checkpoint_and_no_more(run: Run) -> None:
    for rank in range(RANKS):
        client = run.rank(rank)
        if rank == 1:
            for process in run.processes():
                if process.cmdline()[-1] == run.savers.names[1]:
                    process.suspend()
                    hand_over(client, rank, 5)
                    process.kill()
        else:
            hand_over(client, rank, 5)
    run.settle()
    run.wait_for("saver_lost")
    run.settle()
    assert run.store.committed() == []
    assert not list(run.store.root.rglob("rank-*"))


def test_nobody_waits_when_a_person_insists(run: Run) -> None:
    for process in run.processes():
        process.suspend()
    run.settle(hurried=lambda: True)
    for process in run.processes():
        process.resume()
    hand_over(run.rank(0), 0, 3)
    hand_over(run.rank(1), 1, 3)
    run.settle()  # past the answers to what was asked before
    assert [path.name for path in run.store.committed()] == [id_of(3)]


def test_a_saver_that_does_not_answer_is_not_waited_for_for_ever(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    run.processes()[0].suspend()
    run.settle(timeout=0.0)
    run.processes()[0].resume()
    run.settle()


def test_none_is_left_when_they_are_closed(tmp_path: Path, loop: EventLoop) -> None:
    run = Run(tmp_path, loop)
    run.rank(0)
    processes = run.processes()
    before = set(Path("/dev/shm").iterdir())
    run.savers.close()
    assert not any(process.is_running() for process in processes)
    assert set(Path("/dev/shm").iterdir()) == before
