"""What goes after a save."""

from __future__ import annotations

from pathlib import Path

import torch

from autoglm_resume.checkpoint.format.ids import Branch, checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.retention import KeepBest, KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.savers.housekeeping import tidy
from autoglm_resume.worker.base.event_log import EventLog


def saved(store: Store, step: int, token: str, loss: float) -> Snapshot:
    """A checkpoint of one rank, committed."""
    snapshot = capture.take(
        {"m": {"w": torch.full((8,), float(step))}},
        id=checkpoint_id(step, token),
        rank=0,
        world_size=1,
        metrics={"loss": loss},
    )
    PartWriter(store).persist(snapshot)
    return snapshot


def left_after(tmp_path: Path, keep: KeepRules) -> list[str]:
    """Ids, newest first, when the run went back to step 100 and has come to step 300 again."""
    store = Store(tmp_path)
    for step, loss in ((100, 3.0), (200, 0.5), (400, 0.4)):
        saved(store, step, "a0", loss)
    saved(store, 200, "a1", 2.0)
    last = saved(store, 300, "a1", 2.5)
    how = Checkpointing(str(tmp_path), keep=keep, branches=(Branch(100, 1),))
    tidy(store, how, last, frozenset(), EventLog(None, 0).emit)
    return [path.name for path in store.committed()]


def test_the_best_of_a_branch_that_was_given_up_are_not_among_the_best(tmp_path: Path) -> None:
    kept = left_after(tmp_path, KeepRules(last=1, best=KeepBest("loss", 1)))
    assert kept[-2:] == [checkpoint_id(300, "a1"), checkpoint_id(200, "a1")]


def test_round_steps_of_a_branch_that_was_given_up_are_not_kept_for_ever(tmp_path: Path) -> None:
    kept = left_after(tmp_path, KeepRules(last=1, every_steps=200))
    assert kept[-2:] == [checkpoint_id(300, "a1"), checkpoint_id(200, "a1")]
