"""Stops, dead supervisors, second supervisors, and what a resume makes of them."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.conftest import Rehearsal, all_dead, finish
from tests.patience import PATIENCE
from tests.thorough import thorough

SLOWLY = ("--pause", "0.04")
"""Ranks stop a quarter of a second after they are asked to: there are steps left then."""


@pytest.mark.parametrize("launcher", ["warm", *thorough("torchrun")])
def test_a_supervisor_killed_with_sigkill_leaves_no_rank_and_resume_completes_exactly(
    rehearsal: Rehearsal, undisturbed: dict[str, str], launcher: str
) -> None:
    rehearsal.start("--pause", "0.03", launcher=launcher, hold=("0:0:39",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    before = rehearsal.workers()
    assert len(before) >= 4  # the supervisor, its zygote, two ranks
    os.kill(rehearsal.holder(), signal.SIGKILL)
    assert all_dead(before)
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert rehearsal.final() == undisturbed


def test_a_supervisor_killed_during_start_up_leaves_nothing(rehearsal: Rehearsal) -> None:
    rehearsal.start(hold=("0:0:1",))
    rehearsal.wait_for("supervisor_started")
    before = rehearsal.workers()
    os.kill(rehearsal.holder(), signal.SIGKILL)
    assert all_dead(before)


def test_a_stop_saves_first_exits_75_and_resumes_exactly(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    rehearsal.write(*SLOWLY, checkpoint={"every": {"steps": 1000}})
    lives = {10: signal.SIGTERM, 17: signal.SIGINT, 24: signal.SIGUSR2}
    for attempt, (step, number) in enumerate(lives.items()):
        hold = (f"{attempt}:0:{step}",)
        process = rehearsal.command("run", str(rehearsal.directory / "job.yaml"), hold=hold)
        rehearsal.wait_for("first_step", lambda event, a=attempt: event["attempt"] == a)
        process.send_signal(number)
        rehearsal.wait_for("stop_requested", lambda event, a=attempt: event["attempt"] == a)
        rehearsal.release(step)
        stopped = finish(process)
        assert stopped.code == 75, stopped
    saved = sorted({event["step"] for event in rehearsal.events("committed")})
    assert len(saved) == len(lives)
    assert 0 < saved[0] < saved[-1] < 40
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert [event["step"] for event in rehearsal.events("restored") if event["rank"] == 0] == saved
    assert rehearsal.final() == undisturbed


def test_a_storm_of_sigterm_is_one_stop(rehearsal: Rehearsal) -> None:
    process = rehearsal.start(*SLOWLY, checkpoint={"every": {"steps": 1000}}, hold=("0:0:10",))
    rehearsal.wait_for("first_step")
    rehearsal.stop(10, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert finish(process).code == 75
    assert len(rehearsal.events("stop_requested")) == 1


def test_a_second_ctrl_c_stops_at_once(rehearsal: Rehearsal) -> None:
    process = rehearsal.start("--fail", "thread", preemption={"grace": "60s"})
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    process.send_signal(signal.SIGINT)
    rehearsal.wait_for("stop_requested")
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert not rehearsal.workers()


def test_ranks_that_cannot_stop_in_time_are_ended_and_the_last_checkpoint_counts(
    rehearsal: Rehearsal,
) -> None:
    process = rehearsal.start("--fail", "thread", preemption={"grace": "200ms"})
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 75


def test_a_stop_before_the_first_checkpoint_exits_with_128_and_the_signal(
    rehearsal: Rehearsal,
) -> None:
    process = rehearsal.start(hold=("0:0:0",))
    rehearsal.wait_for("supervisor_started")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 128 + signal.SIGTERM


def test_a_schedulers_time_that_ends_before_the_first_checkpoint_fails_for_good(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    ended = rehearsal.run("--pause", "10")
    assert ended.code == 1, ended
    assert "ends before its first checkpoint" in ended.err
    assert rehearsal.events("stop_requested")[0]["by"] == "the end of the job's time"
    assert rehearsal.events("run_failed")[0]["code"] == 1


def test_a_second_supervisor_is_refused_with_76_and_disturbs_nothing(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    first = rehearsal.start(hold=("0:0:39",))
    rehearsal.wait_for("first_step")
    second = rehearsal.resume()
    assert second.code == 76
    assert str(rehearsal.holder()) in second.err
    rehearsal.release(39)
    assert first.wait(PATIENCE) == 0
    assert rehearsal.final() == undisturbed


def test_resume_of_a_finished_run_exits_0_and_starts_nothing(rehearsal: Rehearsal) -> None:
    assert rehearsal.run().code == 0
    attempts = len(rehearsal.events("attempt_started"))
    again = rehearsal.resume()
    assert again.code == 0
    assert "finished" in again.err
    assert len(rehearsal.events("attempt_started")) == attempts


def test_autoglm_stop_saves_and_waits_until_the_run_has_ended(rehearsal: Rehearsal) -> None:
    process = rehearsal.start(*SLOWLY, checkpoint={"every": {"steps": 1000}}, hold=("0:0:10",))
    rehearsal.wait_for("first_step")
    stop = rehearsal.command("stop", str(rehearsal.run_dir))
    rehearsal.wait_for("stop_requested")
    rehearsal.release(10)
    assert finish(stop).code == 0
    assert process.wait(PATIENCE) == 75
    assert rehearsal.events("committed")
