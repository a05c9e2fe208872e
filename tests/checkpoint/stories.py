"""What a run does with files: stories that crashes may cut off anywhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.part import part_file
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.replicas import mirror, repair
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.storage.storage import open_storage
from autoglm_resume.checkpoint.store.commit import commit, sweep
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.savers import housekeeping
from autoglm_resume.supervise.core.history import History
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.worker.base.event_log import EventLog
from tests.checkpoint.lossy import (
    Recorder,
)

RANKS = 2
STEPS = range(1, 6)


@cache
def state_of(step: int, rank: int) -> dict[str, Any]:
    """Both ranks hold the same model, half of which hardly changes; a generator is their own."""
    slowly = torch.linspace(0, 1, 24 * 24).reshape(24, 24) * (1 + step / 1000)
    generator = torch.Generator().manual_seed(100 * step + rank)
    frozen = torch.randn(24, 24, generator=torch.Generator().manual_seed(step // 3))
    return {
        "model": {"frozen": frozen, "trained": slowly, "step": torch.tensor(step)},
        "rng": {"torch": generator.get_state()[:64].clone()},
    }


def snapshots(step: int, lineage: Sequence[int], token: str = "a0") -> list[Snapshot]:
    """Of all ranks; `lineage` are the steps it descends from, newest first."""
    return [
        capture.take(
            state_of(step, rank),
            id=checkpoint_id(step, token),
            rank=rank,
            world_size=RANKS,
            lineage=tuple(checkpoint_id(earlier, "a0") for earlier in lineage),
            model=capture.structure_of(state_of(step, rank)["model"]),
            rng=True,
            created=1_700_000_000.0 + step,
        )
        for rank in range(RANKS)
    ]


class Run:
    """The savers of a run whose store is in `root`, and what they do."""

    def __init__(self, root: Path, recorder: Recorder | None = None) -> None:
        self.root = root
        self.store = Store(root / "store")
        self.savers = [
            PartWriter(self.store, SaveOptions("small", keyframe_every=1)) for _ in range(RANKS)
        ]
        self.recorder = recorder

    def mark(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.mark(text)

    def save(self, taken: Sequence[Snapshot]) -> None:
        """All ranks at once, as their savers do it."""
        failures: list[BaseException] = []

        def persist(rank: int) -> None:
            try:
                self.savers[rank].persist(taken[rank])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=persist, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self.mark(f"saved {taken[0].id}")

    def tidy(self, taken: Sequence[Snapshot], keep: int) -> None:
        """What follows a save, in every rank."""
        how = Checkpointing(dir=str(self.store.root), keep=KeepRules(last=keep))
        for snapshot in taken:
            tell = EventLog(None, snapshot.rank).emit
            housekeeping.tidy(self.store, how, snapshot, frozenset(), tell)

    def follow(self, id: str) -> None:
        """Go on from a checkpoint, as savers of a new attempt do."""
        path = self.store.directory(id)
        for rank, saver in enumerate(self.savers):
            saver.follow(PreviousPart(self.store.load_part(path, rank)))

    def gate(self) -> RunGate:
        job = Job.model_validate(
            {
                "name": "run",
                "script": str(self.root / "train.py"),
                "workdir": str(self.root),
                "run_dir": str(self.root),
                "checkpoint": {"dir": str(self.store.root)},
            }
        )
        return RunGate(job, RANKS, lambda event: None, History())

    def replicate(self, id: str) -> None:
        target = self.root / "replica"
        here = mirror.committed(self.store, {})
        mirror.replicate(self.store, id, here, {}, open_storage(str(target), "run"))
        self.mark(f"replicated {id}")


def lineage_of(step: int) -> list[int]:
    return list(range(step - 1, 0, -1))


TAKEN = {step: snapshots(step, lineage_of(step)) for step in STEPS}
AGAIN = snapshots(3, [2, 1], token="a1")
ID = {step: TAKEN[step][0].id for step in STEPS}


# Stories


def save_and_retire(run: Run) -> None:
    """Saves from nothing, deltas and references among them, one that a rank never finished."""
    for step in STEPS:
        if step == 3:
            PartWriter(run.store, share=False).persist(TAKEN[3][0])
        else:
            run.save(TAKEN[step])
            run.tidy(TAKEN[step], keep=2)
    sweep(run.store)


def quarantine_and_go_on(run: Run) -> None:
    """The gate puts away what a rank refused, and the next attempt saves that step again."""
    for step in (1, 2, 3):
        run.save(TAKEN[step])
    gate = run.gate()
    gate.refuse(ID[3], "a drill")
    point = gate.pass_gate()
    assert point is not None
    assert point.id == ID[2]
    gate.clean()
    run.follow(ID[2])
    run.save(AGAIN)
    run.tidy(AGAIN, keep=2)


def replicate_and_repair(run: Run) -> None:
    """Every checkpoint is copied; then files are lost here, and brought back."""
    (run.root / "replica").mkdir()
    files.sync_directory(run.root)
    for step in (1, 2):
        run.save(TAKEN[step])
        run.replicate(ID[step])
    storage = open_storage(str(run.root / "replica"), "run")
    run.mark(f"damaged {ID[2]}")
    (run.store.directory(ID[2]) / "rank-00001.pack").unlink()
    repair.repair(run.store, ID[2], [storage])
    run.mark(f"saved {ID[2]}")
    for step in (2, 1):
        run.mark(f"damaged {ID[step]}")
        run.store.delete(ID[step])
    repair.restore_missing(run.store, [str(run.root / "replica")])
    run.mark(f"saved {ID[2]}")


def recover_from_a_crash(run: Run) -> None:
    """The gate finishes what was left half done by a crash before the last commit."""
    gate = run.gate()
    point = gate.pass_gate()
    assert point is not None
    run.mark(f"saved {point.id}")
    gate.clean()


def commit_what_another_rank_has_just_put_there(run: Run) -> None:
    """Rank 1's part has its name, which is not flushed yet, when rank 0 sees that all are there."""
    run.savers[0].persist(TAKEN[1][0])
    flush = files.sync_directory

    def overtaken(path: Path) -> None:
        if (path / part_file(1)).exists():
            files.sync_directory = flush
            assert commit(run.store, ID[1]) is not None
        flush(path)

    files.sync_directory = overtaken
    run.savers[1].persist(TAKEN[1][1])
    run.mark(f"saved {ID[1]}")


STORIES = {
    story.__name__.replace("_", " "): story
    for story in (
        save_and_retire,
        recover_from_a_crash,
        quarantine_and_go_on,
        replicate_and_repair,
        commit_what_another_rank_has_just_put_there,
    )
}
