"""Ranks that stop making progress, in every way, in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Rehearsal
from tests.patience import PATIENCE

DEFAULT = {"timeout": "5m"}
SHORT = {"timeout": "3s"}


def test_a_stopped_rank_is_found_by_the_runs_own_pace_long_before_the_limit(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    drills = ("stop:rank=0,step=15", "stop:rank=1,step=32")
    finished = rehearsal.run("--pause", "0.03", drill=drills, heartbeat=DEFAULT)
    assert finished.code == 0, finished
    failures = rehearsal.events("failure")
    assert [(e["kind"], e["root_rank"]) for e in failures] == [("hang", 0), ("hang", 1)]
    assert all("the process is stopped" in failure["summary"] for failure in failures)
    assert rehearsal.final() == undisturbed


@pytest.mark.parametrize(
    ("how", "line"), [("hold-lock", "sum(range"), ("sleepy-data", "time.sleep(1000)")]
)
def test_the_rank_that_others_wait_for_is_named_with_the_line_it_hangs_at(
    rehearsal: Rehearsal, undisturbed: dict[str, str], how: str, line: str
) -> None:
    finished = rehearsal.run("--fail", how, heartbeat=SHORT)
    assert finished.code == 0, finished
    failure = rehearsal.events("failure")[0]
    assert (failure["kind"], failure["root_rank"]) == ("hang", 1)
    place, _, _ = failure["stacks"]["1"][0].partition(" in ")
    file, _, number = place.rpartition(":")
    with Path(file).open() as script:
        assert line in script.readlines()[int(number) - 1]
    assert failure["stacks"]["0"]  # and where the others wait
    stacks = rehearsal.run_dir / "attempts" / "000" / "rank-1.stacks.txt"
    assert "train.py" in stacks.read_text()
    assert not list((rehearsal.run_dir / "attempts" / "001").glob("*.stacks.txt"))
    assert rehearsal.final() == undisturbed


def test_ranks_that_wait_for_each_other_in_different_collectives_are_a_hang(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run("--fail", "deadlock", heartbeat=SHORT)
    assert finished.code == 0, finished
    failure = rehearsal.events("failure")[0]
    # gloo may notice by itself that the two do not agree.
    assert failure["kind"] in ("hang", "communication", "exception", "crashed")
    assert rehearsal.final() == undisturbed


def test_what_is_usual_in_a_run_is_remembered_by_the_next_supervisor(rehearsal: Rehearsal) -> None:
    process = rehearsal.start("--pause", "0.02", "--steps", "80", hold=("0:0:39",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 15)
    rehearsal.stop(40, process)
    assert process.wait(PATIENCE) == 75
    silences = rehearsal.events("gaps")[-1]["silences"]
    assert sum(silences["0"]["4"].values()) >= 10  # forward passes
    assert rehearsal.resume().code == 0
