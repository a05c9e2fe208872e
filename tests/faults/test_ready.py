"""Drills: what is looked at before a start, refused, warned of, or ended."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from tests.faults.conftest import Rehearsal, command_of, finish


@pytest.mark.parametrize("strictness", ["strict", "lenient", "off"])
def test_a_clock_behind_the_run_is_refused_warned_of_or_ignored(
    interrupted: Rehearsal, strictness: str
) -> None:
    guards = {"free_disk": 0, "clock": strictness}
    tomorrow = {"event": "note", "time": time.time() + 86400}
    with (interrupted.run_dir / "events.jsonl").open("a") as journal:
        journal.write(json.dumps(tomorrow) + "\n")
    finished = interrupted.run(guards=guards)  # type: ignore[arg-type]
    warned = [e["text"] for e in interrupted.events("warning") if e["text"].startswith("clock")]
    if strictness == "strict":
        assert finished.code == 2
        assert "guards.clock: clock: expected at most 60 s behind what this run" in finished.err
        assert "guards.clock: lenient" in finished.err
    else:
        assert finished.code == 0, finished
    assert len(warned) == (strictness == "lenient")


def test_what_an_earlier_supervisor_left_behind_is_ended(rehearsal: Rehearsal) -> None:
    patient = {"launcher": "torchrun", "heartbeat": {"timeout": "60s"}}
    running = rehearsal.start("--fail", "daemon", **patient, hold=("0:0:39",))
    rehearsal.wait_for("committed")
    (daemon, *_) = (p for p in rehearsal.workers() if "1234.5" in command_of(p))
    os.kill(rehearsal.holder(), signal.SIGKILL)
    finish(running)
    assert daemon.status() != psutil.STATUS_ZOMBIE
    assert rehearsal.resume().code == 0
    assert not psutil.pid_exists(daemon.pid)
    told = [e["text"] for e in rehearsal.events("warning") if "left behind" in e["text"]]
    assert f"process {daemon.pid} (sleep)" in told[0]


def test_a_collective_round_can_be_asked_for_before_the_first_start(rehearsal: Rehearsal) -> None:
    guards = {"free_disk": 0, "collective": "strict"}
    finished = rehearsal.run("--steps", "5", guards=guards)  # type: ignore[arg-type]
    assert finished.code == 0, finished
