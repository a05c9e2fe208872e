"""A run's directory is the run: commands act on the one that is named, wherever it is."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.store import Store
from tests.faults.conftest import Finished, Rehearsal, finish

TRAIN = Path(__file__).with_name("train_ends.py")


@pytest.fixture
def job(rehearsal: Rehearsal) -> Rehearsal:
    saves = {"every": {"steps": 2}, "on_busy": "wait", "compress": "small", "keep": 9}
    rehearsal.job.update(script=str(TRAIN), nproc_per_node=1, checkpoint=saves)
    return rehearsal


def ids(run: Path) -> list[str]:
    return [path.name for path in Store(run / "checkpoints").committed()]


def test_a_run_that_is_set_aside_linked_or_moved_is_the_one_that_is_meant(job: Rehearsal) -> None:
    def call(*words: object) -> Finished:
        return finish(job.command(*map(str, words)))

    run, aside = job.run_dir, job.run_dir.with_name("job~1")
    assert job.run("own", "4").code == 0
    first = ids(run)
    again = job.write("own", "4", "100")
    process = job.command("run", str(again), "--fresh", hold=("0:0:9",))
    job.wait_for("run_started", lambda e: e["job"]["args"] == ["own", "4", "100"])
    job.wait_for("committed", lambda e: e["step"] == 8)
    live = ids(run)
    assert ids(aside) == first

    assert call("prune", aside, "--keep", "1").code == 0
    assert (ids(run), len(ids(aside)) < len(first)) == (live, True)
    link = job.directory / "link"
    link.symlink_to(run / "checkpoints")
    for named in (run, run / "checkpoints", link):
        refused = call("prune", named, "--keep", "1")
        assert refused.code == 76, refused
    assert ids(run) == live
    exported = call("export", aside, job.directory / "w.pt", "--to", "torch")
    assert exported.code == 0, exported
    assert first[0] in exported.out

    job.processes.sort(key=lambda each: each is process)  # waits watch the last
    process.send_signal(signal.SIGTERM)
    job.wait_for("stop_requested")
    job.release(9)
    assert finish(process).code == 75
    moved = job.directory / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.rename(moved)
    resumed = call("resume", moved)
    assert resumed.code == 0, resumed
    assert f"this run was in {run} before" in resumed.err
    assert not run.exists()
    assert ids(moved)[0].startswith("step-0000000100.a1")
    assert call("verify", moved).code == 0
    for path in (moved / "checkpoints").glob("step-*"):
        Store(moved / "checkpoints").delete(path.name)
    nothing = call("verify", moved)
    assert nothing.code == 90
    assert "expected a checkpoint to verify, found none" in nothing.err
