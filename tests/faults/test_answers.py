"""Answers other than starting again at once: each is carried out, told, and survives a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.checkpoint.format.ids import attempt_of, step_of
from tests.faults.conftest import Rehearsal, fill, finish
from tests.patience import PATIENCE
from tests.thorough import thorough

FAST = {"backoff": "10ms", "max_backoff": "50ms"}
SLOWLY = ("--pause", "0.03")
SMALLER = ("--fail", "exit", *SLOWLY)
AGAIN = ("1:0:39",)
"""The attempt after a failure does not end before its supervisor is killed."""


def answers(rehearsal: Rehearsal) -> list[str]:
    return [event["action"] for event in rehearsal.events("decision")]


def every_start_passed_the_gate(rehearsal: Rehearsal) -> bool:
    names = [e["event"] for e in rehearsal.events() if e["event"] in ("gate", "attempt_started")]
    pairs = list(zip(["", *names], names, strict=False))
    return all(before == "gate" for before, name in pairs if name == "attempt_started")


def on(**more: Any) -> dict[str, Any]:
    """Fields of a job that saves every five steps, however busy the machine is."""
    checkpoint = {"every": {"steps": 5}, "keep": 3, "on_busy": "wait"}
    return {"checkpoint": checkpoint, "restart": {**FAST, **more}}


def diverging(rehearsal: Rehearsal, **fields: Any) -> subprocess.Popen[str]:
    """A run whose loss diverges at step 24, once."""
    words = ("--fail", "diverge", "--at", "24", *SLOWLY)
    process: subprocess.Popen[str] = rehearsal.start(*words, **on(), **fields)
    return process


def test_a_diverged_loss_is_answered_from_an_older_checkpoint(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = finish(diverging(rehearsal))
    assert finished.code == 0, finished
    assert answers(rehearsal) == ["roll_back"]
    committed = [e["step"] for e in rehearsal.events("committed") if e["attempt"] == 0]
    branched = rehearsal.events("branched")[0]
    restarted = rehearsal.events("attempt_started")[1]
    assert restarted["step"] == branched["step"] < max(committed)
    assert every_start_passed_the_gate(rehearsal)
    assert rehearsal.final() == undisturbed
    assert "going back to step" in finished.err


def test_what_was_rolled_back_stays_so_for_the_next_supervisor(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = diverging(rehearsal, hold=AGAIN)
    rehearsal.wait_for("first_step", lambda e: e["attempt"] == 1)
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    step = rehearsal.events("branched")[0]["step"]
    accepted = rehearsal.events("gate")[-1]["accepted"]
    assert step_of(accepted) == step or attempt_of(accepted) >= 1
    assert rehearsal.final() == undisturbed


def cut_after(rehearsal: Rehearsal, kind: str) -> None:
    """Have the journal end as a kill -9 right after the first such event leaves it."""
    path = rehearsal.run_dir / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    end = next(n for n, line in enumerate(lines, 1) if json.loads(line)["event"] == kind)
    path.write_bytes(b"".join(lines[:end]))


def test_a_roll_back_that_was_decided_and_not_begun_is_carried_out_by_the_next_supervisor(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = diverging(rehearsal, hold=AGAIN)
    step = rehearsal.wait_for("branched")["step"]
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    cut_after(rehearsal, "decision")
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert [e["step"] for e in rehearsal.events("branched")] == [step]
    assert rehearsal.events("attempt_started")[-1]["step"] == step
    assert rehearsal.final() == undisturbed


def test_a_run_that_was_to_be_made_smaller_is_so_by_the_next_supervisor(
    rehearsal: Rehearsal,
) -> None:
    process = rehearsal.start(*SMALLER, **on(on={17: "smaller"}), **ELASTIC, hold=AGAIN)
    rehearsal.wait_for("excluded")
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    cut_after(rehearsal, "decision")
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert [e["rank"] for e in rehearsal.events("excluded")] == [1]
    assert [len(e["pids"]) for e in rehearsal.events("attempt_started")] == [2, 1]


def test_without_an_older_checkpoint_it_goes_on_from_the_one_there_is(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run(*("--fail", "diverge", "--at", "8", *SLOWLY), **on())
    assert finished.code == 0, finished
    assert not rehearsal.events("branched")
    assert rehearsal.final() == undisturbed


@pytest.mark.parametrize("key", ["17", *thorough("exited", "/exited with code 1[0-9]/")])
def test_a_failure_that_the_job_stops_for_is_not_tried_again(
    rehearsal: Rehearsal, key: str
) -> None:
    finished = rehearsal.run("--fail", "exit", **on(on={key: "stop"}))
    assert finished.code == 1, finished
    assert len(rehearsal.events("attempt_started")) == 1
    assert f"restart.on has {key}: stop" in finished.err


def test_under_a_scheduler_a_failure_can_be_requeued_and_the_run_goes_on(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    finished = rehearsal.run("--fail", "exit", **on(on={17: "requeue"}))
    assert finished.code == 75, finished
    assert answers(rehearsal) == ["requeue"]
    assert "code 17" in rehearsal.events("run_interrupted")[0]["reason"]
    assert rehearsal.resume().code == 0
    assert rehearsal.final() == undisturbed


def test_without_a_scheduler_a_requeue_is_a_restart(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert rehearsal.run("--fail", "exit", **on(on={17: "requeue"})).code == 0
    assert answers(rehearsal) == ["restart"]
    assert rehearsal.final() == undisturbed


ELASTIC = {"guards": {"free_disk": 0, "world_size": "elastic"}}


def test_an_elastic_run_goes_on_without_the_rank_that_failed_and_stays_so(
    rehearsal: Rehearsal,
) -> None:
    process = rehearsal.start(*SMALLER, **on(on={17: "smaller"}), **ELASTIC, hold=AGAIN)
    rehearsal.wait_for("first_step", lambda e: e["attempt"] == 1)
    assert rehearsal.events("excluded")[0]["rank"] == 1
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert [len(e["pids"]) for e in rehearsal.events("attempt_started")] == [2, 1, 1]
    assert rehearsal.events("resharded")[0]["to"] == 1
    assert every_start_passed_the_gate(rehearsal)


def test_a_run_that_was_made_smaller_still_stops_when_asked(rehearsal: Rehearsal) -> None:
    process = rehearsal.start(*SMALLER, **on(on={17: "smaller"}), **ELASTIC, hold=("1:0:20",))
    rehearsal.wait_for("first_step", lambda e: e["attempt"] == 1)
    rehearsal.stop(20, process)
    assert process.wait(PATIENCE) == 75


def test_a_stop_while_a_run_is_made_smaller_is_not_lost(rehearsal: Rehearsal) -> None:
    process = rehearsal.start(*SMALLER, **on(on={17: "smaller"}), **ELASTIC, hold=("1:0:20",))
    rehearsal.wait_for("excluded")
    rehearsal.stop(20, process)
    assert process.wait(PATIENCE) == 75
    assert not rehearsal.events("run_completed")


def test_a_run_that_is_not_elastic_keeps_its_ranks(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    assert rehearsal.run("--fail", "exit", **on(on={17: "smaller"})).code == 0
    assert answers(rehearsal) == ["restart"]
    assert rehearsal.final() == undisturbed


def test_what_time_may_heal_is_given_a_cool_down_and_then_up(rehearsal: Rehearsal) -> None:
    finished = rehearsal.run("--fail", "killed-always", **on(cool_down="100ms", cool_downs=2))
    assert finished.code == 1, finished
    assert [e["breaker"] for e in rehearsal.events("decision")] == [
        *("closed", "closed", "open", "open", "closed")
    ]
    assert len(rehearsal.events("attempt_started")) == 5
    assert "one try after a cool-down (2 of 2)" in finished.err
    assert "died 5 times in a row without new progress" in finished.err


def test_the_next_supervisor_waits_for_the_rest_of_a_cool_down_but_not_after_a_stop(
    rehearsal: Rehearsal,
) -> None:
    process = rehearsal.start("--fail", "killed-always", **on(cool_down="1h"))
    rehearsal.wait_for("decision", lambda e: e["breaker"] == "open")
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    process = rehearsal.command("resume", str(rehearsal.run_dir))
    assert 3000 < rehearsal.wait_for("waiting")["seconds"] <= 3600
    assert len(rehearsal.events("attempt_started")) == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    process = rehearsal.command("resume", str(rehearsal.run_dir))
    decision = rehearsal.wait_for("decision", lambda e: "2 of 3" in e["reason"])
    assert decision["breaker"] == "open"
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)


def test_a_run_whose_last_save_finds_no_space_waits_for_it_and_then_finishes(
    rehearsal: Rehearsal, small_disk: Path, undisturbed: dict[str, str]
) -> None:
    process, hog = _out_of_space(rehearsal, small_disk)
    assert "bytes are free" in rehearsal.wait_for("paused")["reason"]
    hog.unlink()
    finished = finish(process)
    assert finished.code == 0, finished
    assert answers(rehearsal) == ["pause"]
    assert rehearsal.events("pause_ended")[0]["problem"] == ""
    assert rehearsal.final() == undisturbed


def test_a_pause_ends_when_the_run_is_asked_to_stop(rehearsal: Rehearsal, small_disk: Path) -> None:
    process, _ = _out_of_space(rehearsal, small_disk)
    rehearsal.wait_for("paused")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    assert not rehearsal.events("run_failed")


def test_a_stop_during_a_pause_does_not_need_the_storage_that_is_away(
    rehearsal: Rehearsal, small_disk: Path
) -> None:
    process, _ = _out_of_space(rehearsal, small_disk)
    rehearsal.wait_for("paused")
    (small_disk / "ckpt").rename(small_disk / "away")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    committed = max(e["step"] for e in rehearsal.events("committed"))
    assert rehearsal.events("run_interrupted")[0]["step"] == committed


def test_a_pause_goes_on_in_the_next_supervisor(
    rehearsal: Rehearsal, small_disk: Path, undisturbed: dict[str, str]
) -> None:
    process, hog = _out_of_space(rehearsal, small_disk)
    rehearsal.wait_for("paused")
    os.kill(rehearsal.holder(), signal.SIGKILL)
    process.wait(PATIENCE)
    hog.unlink()
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert rehearsal.events("pause_ended")
    assert rehearsal.final() == undisturbed


def _out_of_space(rehearsal: Rehearsal, disk: Path) -> tuple[subprocess.Popen[str], Path]:
    """A run whose checkpoints' disk has filled up, and what fills it."""
    job = on()
    process: subprocess.Popen[str] = rehearsal.start(
        *SLOWLY,
        checkpoint={**job["checkpoint"], "dir": str(disk / "ckpt")},
        restart=job["restart"],
        hold=("0:0:20",),
    )
    rehearsal.wait_for("committed", lambda e: e["step"] == 10)
    hog = fill(disk)
    rehearsal.release(20)
    return process, hog
