"""What a run is: not what an attempt that was refused had declared."""

from __future__ import annotations

import json
from typing import Any

from tests.faults.conftest import Rehearsal, finish

REFUSED = 90


def interrupted(rehearsal: Rehearsal, **fields: Any) -> None:
    """A run that has checkpoints of steps 5 and 10, and was stopped."""
    process = rehearsal.start(hold=("0:0:12",), **fields)
    rehearsal.wait_for("committed", lambda event: event["step"] == 10)
    rehearsal.stop(12, process)
    assert finish(process).code == 75


def test_one_attempt_with_the_wrong_model_does_not_cost_the_run(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    interrupted(rehearsal)
    job = (rehearsal.run_dir / "job.json").read_bytes()
    there = sorted(path.name for path in rehearsal.checkpoints.iterdir())
    refused = rehearsal.run("--width", "32")
    assert refused.code == REFUSED
    assert "[1, 64] float32 in the checkpoint, [1, 32] float32 in this model" in refused.err
    assert sorted(path.name for path in rehearsal.checkpoints.iterdir()) == there
    assert (rehearsal.run_dir / "job.json").read_bytes() == job, "what `resume` goes on with"
    assert rehearsal.resume().code == 0
    assert rehearsal.final() == undisturbed


def test_a_config_file_that_was_edited_and_is_put_back_is_the_runs(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    config = rehearsal.directory / "model.json"
    config.write_text(json.dumps({"width": 64}))
    guards = {"free_disk": 0, "config_files": [str(config)]}
    interrupted(rehearsal, guards=guards)
    config.write_text(json.dumps({"width": 65}))
    assert rehearsal.run(guards=guards).code == REFUSED
    config.write_text(json.dumps({"width": 64}))
    assert rehearsal.run(guards=guards).code == 0
    assert rehearsal.final() == undisturbed


def test_other_ranks_once_do_not_cost_the_run(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    interrupted(rehearsal)
    assert rehearsal.run(nproc_per_node=1).code == REFUSED
    assert rehearsal.resume().code == 0
    assert rehearsal.final() == undisturbed
