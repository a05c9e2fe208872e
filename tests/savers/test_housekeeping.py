"""What goes after a save."""

from __future__ import annotations

from pathlib import Path

import torch

from autoglm_resume.checkpoint.format.ids import Branch, checkpoint_id
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.retention import KeepBest, KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.savers.housekeeping import tidy
from autoglm_resume.worker.base.event_log import EventLog


def saved(
    store: Store, step: int, token: str, loss: float, origin: Origin | None = None
) -> Snapshot:
    """A checkpoint of one rank, committed."""
    snapshot = capture.take(
        {"m": {"w": torch.full((8,), float(step))}},
        id=checkpoint_id(step, token),
        rank=0,
        world_size=1,
        metrics={"loss": loss},
        origin=origin,
    )
    PartWriter(store).persist(snapshot)
    return snapshot


def left_after(tmp_path: Path, keep: KeepRules) -> list[str]:
    """Ids, newest first, when the run went back to step 100 and has come to step 300 again."""
    store = Store(tmp_path)
    for step, loss in ((100, 3.0), (200, 0.5), (400, 0.4)):  # the last two are left behind
        saved(store, step, "a0", loss)
    saved(store, 200, "a1", 2.0)
    last = saved(store, 300, "a1", 2.5)
    how = Checkpointing(str(tmp_path), keep=keep, branches=(Branch(100, 1),))
    tidy(store, how, last, frozenset(), EventLog(None, 0).emit)
    return [path.name for path in store.committed()]


def test_what_a_branch_left_behind_stays_and_the_present_one_has_its_own_best(
    tmp_path: Path,
) -> None:
    kept = left_after(tmp_path, KeepRules(last=1, best=KeepBest("loss", 1)))
    ids = [(400, "a0"), (300, "a1"), (200, "a1"), (200, "a0")]
    assert kept == [checkpoint_id(step, token) for step, token in ids]


def test_what_a_newer_version_wrote_may_need_all_that_is_older(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (100, 200, 300):
        saved(store, step, "a0", 1.0)
    manifest = store.directory(checkpoint_id(200, "a0")) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": ', '"format": 9'))
    last = saved(store, 400, "a0", 1.0)
    tidy(store, Checkpointing(str(tmp_path), keep=KeepRules(last=1)), last, frozenset(), _quiet)
    left = [path.name for path in store.committed()]
    assert left == [checkpoint_id(step, "a0") for step in (400, 200, 100)]


def _quiet(event: object, /) -> None:
    """Nobody listens."""


def test_what_another_run_has_made_is_not_deleted_and_pushes_nothing_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (10, 20, 30):
        saved(store, step, "xff", 1.0, Origin("theirs"))
    older = saved(store, 15, "x01", 1.0)  # by a version that did not say whose it was
    for step in (12, 22, 32, 42):
        last = saved(store, step, "x0", 1.0, Origin("ours"))
    how = Checkpointing(str(tmp_path), keep=KeepRules(last=2))
    tidy(store, how, last, frozenset(), EventLog(None, 0).emit)
    left = [path.name for path in store.committed()]
    assert [id for id in left if id.endswith("xff")] == [
        checkpoint_id(step, "xff") for step in (30, 20, 10)
    ]
    assert [id for id in left if id.endswith("x0")] == [
        checkpoint_id(step, "x0") for step in (42, 32)
    ]
    assert older.id not in left
