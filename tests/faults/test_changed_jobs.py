"""A job file that was edited: what changed is said, and taken."""

from __future__ import annotations

from tests.faults.conftest import Rehearsal, finish


def test_a_finished_run_that_is_asked_for_more_steps_goes_on(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("--steps", "10", nproc_per_node=1).code == 0
    more = rehearsal.run("--steps", "20", nproc_per_node=1)
    assert more.code == 0, more
    assert "the finished run goes on: --steps: 10 then, 20 now" in more.err
    assert [event["step"] for event in rehearsal.events("attempt_started")] == [0, 10]
    assert rehearsal.events("run_completed")[-1]["step"] == 20
    again = rehearsal.run("--steps", "20", "--pause", "0", nproc_per_node=1)
    assert again.code == 2, again
    assert "this run is finished at step 20, and the script asks for no more steps" in again.err
    assert "--set name=job-2" in again.err
    assert rehearsal.resume().code == 0, "it is what it was"
    assert len(rehearsal.events("attempt_started")) == 3


def test_a_run_goes_on_with_the_job_file_that_is_named(interrupted: Rehearsal) -> None:
    how = {**interrupted.job["checkpoint"], "skip": ["optimizer.settings"]}
    fails = ("--fail", "well,exit", "--at", "40")
    job = interrupted.write("--steps", "60", *fails, checkpoint=how)
    resumed = finish(interrupted.command("resume", str(job)))
    assert resumed.code == 0, resumed
    assert "the job is another one now: --steps: not given then, 60 now;" in resumed.err
    assert "; checkpoint.skip: not given then, [optimizer.settings] now" in resumed.err
    assert interrupted.events("run_completed")[-1]["step"] == 60
    assert interrupted.events("attempt_started")[-1]["resume"] == "step-0000000045.a1"
    said = "optimizer: goes on with the settings that the script gives it"
    warned = [e for e in interrupted.events("warning") if e["text"] == said]
    assert [event["attempt"] for event in warned] == [1], "the next one is from its own"


def test_a_new_run_begins_with_the_model_of_another(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("--steps", "10", nproc_per_node=1).code == 0
    source, model = rehearsal.run_dir, rehearsal.final()["model"]
    job = rehearsal.write("--steps", "0", nproc_per_node=1, name="tune")
    rehearsal.run_dir = source.with_name("tune")
    warm = ("run", str(job), "--init-from", str(source), "--only", "model")
    other = finish(rehearsal.command(*warm, "--", "--width", "32"))
    assert other.code == 90, other
    assert "--init-from step-0000000010.a0: model hash" in other.err
    assert len(rehearsal.events("attempt_started")) == 1, "no other one is offered"
    begun = finish(rehearsal.command(*warm, "--fresh"))
    assert begun.code == 0, begun
    assert "optimizer: starts as the script makes it, not from the checkpoint" in begun.err
    (event,) = rehearsal.events("begun_from")
    assert (event["step"], event["only"]) == (10, ["model"])
    assert rehearsal.final()["model"] == model, "no step has changed it"
