"""Drills: a run tells people, and explains itself afterwards."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.faults.conftest import Rehearsal, all_dead, finish

OCCASIONS = ["started", "failed", "recovered", "completed", "interrupted", "gave_up", "died"]


def told(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (rehearsal.directory / "told.jsonl").open()]


def notices(directory: Path) -> list[dict[str, Any]]:
    line = f"cat >> {directory}/told.jsonl"
    return [{"command": line, "on": OCCASIONS}]


def test_a_failure_the_recovery_and_the_end_are_told(rehearsal: Rehearsal) -> None:
    finished = rehearsal.run(
        drill=("kill:rank=1,step=12",),
        notify=notices(rehearsal.directory),  # type: ignore[arg-type]
    )
    assert finished.code == 0, finished
    bodies = told(rehearsal)
    assert [body["event"] for body in bodies] == ["started", "failed", "recovered", "completed"]
    failed = bodies[1]
    assert (failed["kind"], failed["rank"], failed["state"]) == ("killed", 1, "recovering")
    assert rehearsal.workers() == []
    explained = finish(rehearsal.command("explain", str(rehearsal.run_dir)))
    assert explained.out.startswith("job: done at step 40\n")
    assert "rank 1 died by SIGKILL" in explained.out
    assert "attempt 1 took checkpoint step" in explained.out


def test_a_hook_that_never_ends_and_one_that_cannot_start_change_nothing(
    rehearsal: Rehearsal,
) -> None:
    hooks = [{"command": ["sleep", "1234.5"]}, {"command": ["no-such-command"]}]
    finished = rehearsal.run(drill=("kill:rank=1,step=12",), notify=hooks)  # type: ignore[arg-type]
    assert finished.code == 0, finished
    targets = {event["target"] for event in rehearsal.events("notify_failed")}
    assert targets == {"command sleep", "command no-such-command"}
    assert rehearsal.workers() == []


def test_the_death_of_the_supervisor_is_told_and_nothing_stays_behind(
    rehearsal: Rehearsal,
) -> None:
    running = rehearsal.start("--steps", "100000", notify=notices(rehearsal.directory))
    rehearsal.wait_for("committed")
    workers = rehearsal.workers()
    os.kill(rehearsal.holder(), signal.SIGKILL)
    finish(running)
    assert all_dead(workers)
    assert [body["event"] for body in told(rehearsal)] == ["started", "died"]
    assert "its supervisor died" in finish(rehearsal.command("status", "runs")).out
