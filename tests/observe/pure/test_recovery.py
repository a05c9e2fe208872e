from __future__ import annotations

import pytest

from autoglm_resume.observe.pure.recovery import recoveries
from autoglm_resume.observe.pure.segments import attempts
from tests.observe.runs import Script, killed_once


def test_the_phases_add_up_to_the_whole_time() -> None:
    (recovery,) = recoveries(attempts(killed_once().events))
    assert recovery.total == pytest.approx(20.2 - 18.5)
    assert sum(took for _, took in recovery.phases) == pytest.approx(recovery.total)
    assert recovery.detected == pytest.approx(0.04)
    names = [name for name, _ in recovery.phases]
    assert names == ["detect", "stop", "wait", "gate", "spawn", "set-up", "restore", "first step"]
    assert dict(recovery.phases)["restore"] == pytest.approx(0.2)


def test_a_drill_is_known_as_the_cause() -> None:
    (recovery,) = recoveries(attempts(killed_once().events))
    assert recovery.drills == ("kill:rank=1,step=6",)
    assert recovery.rank == 1


def test_steps_lost_are_those_after_the_checkpoint() -> None:
    (recovery,) = recoveries(attempts(killed_once().events))
    assert (recovery.at_step, recovery.from_step, recovery.lost) == (6, 4, 2)
    assert recovery.checkpoint == "step-0000000004.a0"
    assert recovery.checks == ("integrity", "world size")


def test_what_the_gate_rejected_is_kept_with_its_reason() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 70).gate(40, rejected=(60,))
    run.attempt(1, 40, "step-0000000040.a0")
    (recovery,) = recoveries(attempts(run.events))
    assert [no.step for no in recovery.rejected] == [60]
    assert recovery.rejected[0].reason.startswith("integrity: rank-00001.pack")


def test_a_real_death_without_a_known_moment_counts_from_its_detection() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7).at(6).gate(0).attempt(1)
    run.at(8).both("first_step", attempt=1, step=1)
    (recovery,) = recoveries(attempts(run.events))
    assert recovery.detected is None
    assert recovery.total == 3.0


def test_a_drill_that_lets_a_rank_exit_later_is_not_the_moment_of_the_death() -> None:
    run = Script().life().attempt(0).at(1).say("drill", attempt=0, kind="exit", spec="exit:code=3")
    run.at(60).fails(0, 50, kind="exit")
    (recovery,) = recoveries(attempts(run.events))
    assert recovery.drills == ("exit:code=3",)
    assert recovery.detected is None


def test_time_to_the_next_step_spans_attempts_that_never_stepped() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7).at(6).attempt(1).at(7).fails(1, -1)
    run.at(8).attempt(2).at(9).both("first_step", attempt=2, step=1)
    first, second = recoveries(attempts(run.events))
    assert (first.total, second.total) == (4.0, 2.0)
    assert second.lost is None


def test_giving_up_is_told_with_its_reason() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7)
    run.say("decision", attempt=0, action="give_up", reason="max_restarts: 3 is spent")
    (recovery,) = recoveries(attempts(run.events))
    assert recovery.gave_up == "max_restarts: 3 is spent"
    assert recovery.next_attempt is None
    assert recovery.total is None


def test_a_supervisor_that_died_is_a_failure_of_unknown_extent() -> None:
    run = Script().life().attempt(0).at(9).save(0, 20)
    run.at(30).life(resumed=True).gate(20).attempt(1, 20, "step-0000000020.a0")
    (recovery,) = recoveries(attempts(run.events))
    assert recovery.kind == "supervisor"
    assert recovery.lost is None


def test_stopping_on_request_is_no_failure() -> None:
    run = Script().life().attempt(0).at(9).say("attempt_ended", attempt=0, outcome="interrupted")
    run.say("run_interrupted", attempt=0, code=75).at(30).life(resumed=True).attempt(1)
    assert recoveries(attempts(run.events)) == []
