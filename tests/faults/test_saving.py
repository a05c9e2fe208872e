"""Faults around a save: what was handed over counts, and nothing else does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.supervise.base.stops import SAVE
from tests.faults.conftest import Rehearsal, all_dead, finish
from tests.patience import PATIENCE, soon
from tests.thorough import thorough


def checkpoint(steps: int = 5, **fields: Any) -> dict[str, Any]:
    return {"every": {"steps": steps}, "keep": 3, **fields}


def shared_memory() -> set[str]:
    """Files in it; a semaphore has a name there for a moment."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def test_a_rank_killed_in_the_step_after_a_save_resumes_from_that_save_and_from_memory(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run(
        *("--fail", "segv", "--at", "15"), checkpoint=checkpoint(on_busy="wait")
    )
    assert finished.code == 0, finished
    restored = rehearsal.events("restored")
    assert [(event["step"], event["memory"]) for event in restored] == [(15, True)] * 2
    assert "restored step 15 from memory" in finished.err
    assert rehearsal.final() == undisturbed


def test_a_rank_killed_while_its_snapshot_is_copied_resumes_from_that_or_the_one_before(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run(
        *("--fail", "at-once", "--at", "15"), checkpoint=checkpoint(on_busy="wait")
    )
    assert finished.code == 0, finished
    assert {event["step"] for event in rehearsal.events("restored")} <= {10, 15}
    assert len({event["step"] for event in rehearsal.events("restored")}) == 1
    assert rehearsal.final() == undisturbed


def test_savers_that_are_killed_are_replaced_and_training_goes_on(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(checkpoint=checkpoint(2), hold=("0:0:10",))
    rehearsal.wait_for("committed")
    killed = rehearsal.savers()
    assert len(killed) == 2
    for saver in killed:
        saver.kill()
    rehearsal.release(10)
    rehearsal.wait_for("committed", lambda e: e["step"] >= 20)
    assert process.wait(PATIENCE) == 0
    assert {event["pid"] for event in rehearsal.events("saver_lost")} == {s.pid for s in killed}
    assert len(rehearsal.events("attempt_started")) == 1
    assert rehearsal.final() == undisturbed


def test_savers_that_hang_cost_checkpoints_but_no_step(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(checkpoint=checkpoint(2, on_busy="skip"), hold=("0:0:10",))
    rehearsal.wait_for("committed")
    savers = rehearsal.savers()
    for saver in savers:
        saver.suspend()
    rehearsal.release(10)
    skipped = rehearsal.wait_for("save_skipped")
    assert skipped["reason"] == "the last one is under way"
    for saver in savers:
        saver.resume()
    assert process.wait(PATIENCE) == 0
    assert len(rehearsal.events("attempt_started")) == 1
    assert rehearsal.final() == undisturbed


@pytest.mark.parametrize("on_busy", ["wait", *thorough("skip")])
def test_a_save_at_every_step_changes_nothing_whatever_is_done_when_it_is_late(
    rehearsal: Rehearsal, undisturbed: dict[str, str], on_busy: str
) -> None:
    finished = rehearsal.run(
        drill=("kill:rank=1,step=12",),
        checkpoint=checkpoint(1, on_busy=on_busy, compress="small", keyframe_every=3),
    )
    assert finished.code == 0, finished
    committed = {event["step"] for event in rehearsal.events("committed")}
    skipped = {event["step"] for event in rehearsal.events("save_skipped")}
    resumed = rehearsal.events("restored")[0]["step"]
    assert committed | skipped >= set(range(1, 41)) - {resumed + 1}, "but for one that was killed"
    assert not skipped or on_busy == "skip"
    assert rehearsal.final() == undisturbed


@pytest.mark.parametrize("memory", [0, *thorough(1)])
def test_with_less_memory_the_result_is_the_same(
    rehearsal: Rehearsal, undisturbed: dict[str, str], memory: int
) -> None:
    process = rehearsal.start(drill=("kill:rank=0,step=12",), checkpoint=checkpoint(memory=memory))
    rehearsal.wait_for("first_step")
    assert len(rehearsal.savers()) == 2 * memory
    assert process.wait(PATIENCE) == 0
    assert {event["step"] for event in rehearsal.events("restored")} <= {5, 10, 15}
    assert rehearsal.final() == undisturbed


def test_a_job_may_ask_to_be_stopped_by_a_save_that_fails(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.checkpoints.mkdir(parents=True)
    (rehearsal.checkpoints / "step-0000000015.a0").write_text("a file is in the way")
    saves = checkpoint(on_error="stop", on_busy="wait")
    finished = rehearsal.run("--pause", "0.03", checkpoint=saves)
    assert finished.code == 0, finished
    failure = rehearsal.events("failure")[0]
    assert "SaveFailed" in failure["summary"]
    assert "step-0000000015.a0" in rehearsal.events("save_failed")[0]["reason"]
    restored = rehearsal.events("restored")[0]
    assert (restored["step"], restored["memory"]) == (15, True), "memory did not fail"
    assert rehearsal.final() == undisturbed


def test_a_supervisor_killed_in_the_middle_of_a_save_leaves_no_process_and_no_memory(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    before = shared_memory()
    rehearsal.start("--pause", "0.03", checkpoint=checkpoint(1), hold=("0:0:39",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    workers, savers = rehearsal.workers(), rehearsal.savers()
    assert len(savers) == 2
    assert {saver.pid for saver in savers} < {worker.pid for worker in workers}
    os.kill(rehearsal.holder(), signal.SIGKILL)
    assert all_dead(workers)
    assert not rehearsal.workers()
    assert shared_memory() == before
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert shared_memory() == before
    assert rehearsal.final() == undisturbed


def test_a_run_is_not_complete_before_its_last_checkpoint_is_on_storage(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.checkpoints.mkdir(parents=True)
    (rehearsal.checkpoints / "step-0000000040.a0").write_text("a file is in the way")
    finished = rehearsal.run(checkpoint=checkpoint())
    assert finished.code == 0, finished
    assert len(rehearsal.events("attempt_started")) == 2
    assert rehearsal.events("committed")[-1]["id"] == "step-0000000040.a1"
    assert rehearsal.final() == undisturbed


def test_a_last_checkpoint_that_is_only_in_memory_is_what_the_run_goes_on_from(
    rehearsal: Rehearsal,
) -> None:
    rehearsal.checkpoints.mkdir(parents=True)
    (rehearsal.checkpoints / "step-0000000040.a0").write_text("a file is in the way")
    # With two ranks, the one whose save fails first may end the other before that has its snapshot.
    finished = rehearsal.run(checkpoint=checkpoint(), nproc_per_node=1)
    assert finished.code == 0, finished
    restored = rehearsal.events("restored")[0]
    assert (restored["step"], restored["sealed"]) == (40, True)
    assert rehearsal.events("committed")[-1]["id"] == "step-0000000040.a1"


def test_what_was_never_on_storage_is_not_missed_there(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.checkpoints.mkdir(parents=True)
    for step in range(5, 40, 5):
        (rehearsal.checkpoints / f"step-{step:010d}.a0").write_text("a file is in the way")
    process = rehearsal.start(checkpoint=checkpoint(5), hold=("0:0:39",))
    rehearsal.wait_for("save_failed")
    savers = rehearsal.savers()
    for saver in savers:
        saver.suspend()
    os.kill(rehearsal.events("attempt_started")[0]["pids"]["0"], signal.SIGKILL)
    for saver in savers:  # without having said what they hold
        saver.kill()
    assert process.wait(PATIENCE) == 0
    assert rehearsal.events("attempt_started")[1]["step"] == 0, "nothing was ever committed"
    assert rehearsal.final() == undisturbed


def test_a_snapshot_in_memory_serves_as_often_as_ranks_die(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.checkpoints.mkdir(parents=True)
    for attempt in range(3):
        (rehearsal.checkpoints / f"step-0000000010.a{attempt}").write_text("a file is in the way")
    finished = rehearsal.run(
        drill=("kill:rank=0,step=12", "kill:rank=1,step=14"),  # of which attempt 0 sees 13 at most
        checkpoint=checkpoint(10, on_busy="wait"),
    )
    assert finished.code == 0, finished
    starts = [(e["step"], e["sealed"]) for e in rehearsal.events("restored") if e["rank"] == 0]
    assert starts == [(10, True), (10, True)]
    assert rehearsal.final() == undisturbed


WAITS = """
import pathlib, time
here = pathlib.Path(__file__).parent
(here / "importing").touch()
while not (here / "go on").exists():
    time.sleep(0.01)
"""
"""A module whose import takes as long as a test wants."""


def test_a_save_that_is_asked_for_while_there_are_no_ranks_yet_is_told_so(
    rehearsal: Rehearsal,
) -> None:
    (rehearsal.directory / "waits.py").write_text(WAITS)
    path = {"PYTHONPATH": str(rehearsal.directory)}
    process = rehearsal.start("--steps", "10", preload=["waits"], env=path)
    until = soon()
    while not (rehearsal.directory / "importing").exists():
        assert time.monotonic() < until
        assert process.poll() is None, finish(process)
    process.send_signal(SAVE)
    asked = rehearsal.wait_for("save_requested")
    assert (asked["step"], asked["reason"]) == (None, "the ranks are not training yet")
    (rehearsal.directory / "go on").touch()
    assert finish(process).code == 0
