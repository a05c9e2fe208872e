"""What a run is: not what an attempt that was refused had declared."""

from __future__ import annotations

import json
import shutil
import signal

from tests.faults.conftest import Rehearsal, finish

REFUSED = 90


def test_one_attempt_with_the_wrong_model_does_not_cost_the_run(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.run_to_12()
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
    rehearsal.run_to_12(guards=guards)
    config.write_text(json.dumps({"width": 65}))
    assert rehearsal.run(guards=guards).code == REFUSED
    config.write_text(json.dumps({"width": 64}))
    assert rehearsal.run(guards=guards).code == 0
    assert rehearsal.final() == undisturbed


def test_other_ranks_once_do_not_cost_the_run(
    interrupted: Rehearsal, undisturbed: dict[str, str]
) -> None:
    assert interrupted.run(nproc_per_node=1).code == REFUSED
    assert interrupted.resume().code == 0
    assert interrupted.final() == undisturbed


def test_a_branch_that_was_given_up_does_not_come_back_when_only_a_replica_is_left(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    copies = rehearsal.directory / "copies"
    copies.mkdir()
    how = {**rehearsal.job["checkpoint"], "replicas": [str(copies)]}
    process = rehearsal.start(hold=("0:0:17",), checkpoint=how)
    rehearsal.wait_for("committed", lambda event: event["step"] == 15)
    rehearsal.stop(17, process)
    assert finish(process).code == 75
    process = rehearsal.command("resume", str(rehearsal.run_dir), "--from", "5", hold=("1:0:7",))
    rehearsal.wait_for("first_step", lambda event: event["attempt"] == 1)
    process.send_signal(signal.SIGTERM)
    rehearsal.wait_for("stop_requested", lambda event: event["attempt"] == 1)
    rehearsal.release(7)
    assert finish(process).code == 75
    shutil.rmtree(rehearsal.run_dir)
    assert rehearsal.run(checkpoint=how).code == 0
    (back,) = rehearsal.events("brought_back")
    assert back["id"].endswith(".a1"), "not step 15 and later of attempt 0"
    assert rehearsal.final() == undisturbed
