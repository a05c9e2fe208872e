"""How a script ends: a run is complete when its result is in a checkpoint, and says if not."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.checkpoint.store.store import Store
from tests.faults.conftest import Rehearsal, fill, finish
from tests.patience import PATIENCE
from tests.thorough import thorough

SAVES = {"every": {"steps": 5}, "on_busy": "wait"}
TRAIN = Path(__file__).with_name("train_ends.py")


@pytest.fixture
def job(rehearsal: Rehearsal) -> Rehearsal:
    rehearsal.job.update(script=str(TRAIN), nproc_per_node=1, checkpoint=SAVES)
    return rehearsal


def newest(job: Rehearsal) -> int:
    found = Store(job.checkpoints).latest()
    return int(found.name.split(".")[0].removeprefix("step-")) if found else 0


@pytest.mark.parametrize("how", ["break", "own", *thorough("return")])
def test_whatever_the_loop_the_run_is_complete_with_its_last_step(job: Rehearsal, how: str) -> None:
    finished = job.run(how, "4")
    assert finished.code == 0, finished
    assert "run completed at step 13" in finished.err
    assert newest(job) == 13


@pytest.mark.parametrize(
    ("how", "steps", "ranks"),
    [
        ("forget", "steps 11 to 13 are", 1),
        ("raise", "steps 11 to 12 are", 1),
        ("exit", "steps 11 to 12 are", 1),
        ("one rank", "steps 11 to 13 are", 2),
    ],
)
def test_a_run_whose_last_steps_are_in_no_checkpoint_is_not_complete(
    job: Rehearsal, how: str, steps: str, ranks: int
) -> None:
    finished = job.run(how, "4", nproc_per_node=ranks)
    assert finished.code == 1, finished
    assert f"the script ended well, and {steps} in no checkpoint" in finished.err
    assert "called in every rank" in finished.err
    assert len(job.events("attempt_started")) == 1, "it would end in the same way again"
    assert not job.events("run_completed")
    assert [event["outcome"] for event in job.events("attempt_ended")] == ["failed"]


def test_a_job_may_have_such_a_run_restarted(job: Rehearsal) -> None:
    restart = {"on": {"no_result": "restart"}, "max_restarts": 1}
    finished = job.run("forget", "4", restart=restart)
    assert finished.code == 1, finished
    assert len(job.events("attempt_started")) > 1


def test_the_steps_of_an_epoch_asked_for_again_fail_the_run(job: Rehearsal) -> None:
    finished = job.run("epochs", "4")
    assert finished.code == 2, finished
    assert len(job.events("attempt_started")) == 1, "it would be so again"
    assert "session.steps(4) was called before" in finished.err
    assert "for 4 steps in each, session.steps((epoch + 1) * 4)" in finished.err


def test_fewer_steps_than_the_checkpoint_has_are_no_completed_run(job: Rehearsal) -> None:
    assert job.run("less", "4", "8", restart={"max_restarts": 0}).code == 1
    finished = job.run("less", "4", "6")
    assert finished.code == 1, finished
    assert "the script asks for 6 steps, and the checkpoint" in finished.err
    assert job.run("less", "4", "13").code == 0


def on(disk: Path, **checkpoint: Any) -> dict[str, Any]:
    """Fields of a job that saves on a disk with room for two checkpoints."""
    rules = {**SAVES, "dir": str(disk / "checkpoints"), "compress": "off"}
    return {"checkpoint": {**rules, **checkpoint}, "guards": {"free_disk": 0, "disk": "off"}}


def test_the_last_save_of_a_loop_of_ones_own_waits_for_space(
    job: Rehearsal, small_disk: Path
) -> None:
    process = job.start("own", "50000", **on(small_disk), hold=("0:0:12",))
    job.wait_for("committed", lambda e: e["step"] == 10)
    hog = fill(small_disk)
    job.release(12)
    paused = job.wait_for("paused")
    assert paused["until"] == "space"
    hog.unlink()
    job.checkpoints = small_disk / "checkpoints"
    Store(job.checkpoints).delete(Store(job.checkpoints).committed()[-1].name)
    finished = finish(process)
    assert finished.code == 0, finished
    assert newest(job) == 13
    assert job.events("failure")[-1]["kind"] == "disk_full"


def test_a_stop_whose_save_failed_says_what_it_goes_on_from(
    job: Rehearsal, small_disk: Path
) -> None:
    process = job.start("own", "50000", "100000", **on(small_disk), hold=("0:0:8",))
    job.wait_for("committed", lambda e: e["step"] == 5)
    fill(small_disk)
    process.send_signal(signal.SIGTERM)
    job.wait_for("stop_requested")
    job.release(8)
    finished = finish(process, PATIENCE)
    assert finished.code == 75, finished
    reason = job.events("run_interrupted")[0]["reason"]
    assert re.match(r"stopped; continues from step 5, not from step \d+, which it had", reason)
    assert "No space left on device" in reason
    assert job.events("stopped")[0]["unsaved"]
