from __future__ import annotations

import random

import pytest

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.goodput import summarize
from tests.observe.runs import WALL, Script, killed_once


def training() -> Script:
    run = Script().life().at(1).attempt(0).at(2).both("first_step", attempt=0, step=1)
    return run.at(11).save(0, 10, took=0.5)


def test_goodput_is_the_time_of_kept_steps_without_saves() -> None:
    summary = summarize(killed_once().events)
    # Attempt 0: 12 to 16, four steps kept. Attempt 1: 19.2 to 25.3 with one save inside.
    assert summary.kept == pytest.approx(4.0 + (25.3 - 19.2) - 0.1)
    assert summary.saving == pytest.approx(0.1)
    assert summary.elapsed == pytest.approx(15.5)
    assert summary.goodput == pytest.approx(10.0 / 15.5)


def test_a_finished_run_has_the_digests_of_its_end_the_model_first() -> None:
    summary = summarize(killed_once().events)
    assert summary.state == "finished"
    assert list(summary.objects.items()) == [("model", "blake3:f"), ("rng", "blake3:r")]
    assert (summary.step, summary.code) == (10, 0)


def test_steps_that_a_later_attempt_had_to_repeat_are_not_kept() -> None:
    run = Script().life().at(0).attempt(0).at(1).both("first_step", attempt=0, step=1)
    run.at(10).save(0, 10, took=0).at(20).save(0, 20, took=0).at(25).fails(0, 25)
    # Step 20 turns out to be damaged only after the restart from it has failed.
    run.at(30).attempt(1, 20, "step-0000000020.a0").at(31).both("first_step", attempt=1, step=21)
    run.at(35).fails(1, 25).at(40).gate(10, rejected=(20,)).attempt(2, 10, "step-0000000010.a0")
    run.at(41).both("first_step", attempt=2, step=11).at(50).save(2, 20, took=0)
    run.say("run_completed", step=20)
    summary = summarize(run.events)
    assert summary.kept == pytest.approx(10.0 + 10.0)
    assert [a.start_step for a in summary.attempts] == [0, 20, 10]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_wall_clock_that_jumps_changes_nothing(jump: float) -> None:
    told = killed_once().events
    before = summarize(told)
    half = len(told) // 2
    jumped = [e.but(time=WALL + (e.mono or 0.0) + jump * (i > half)) for i, e in enumerate(told)]
    assert summarize(jumped).goodput == before.goodput


def test_a_pause_between_two_supervisors_of_one_boot_is_monotonic_time() -> None:
    run = training().say("run_interrupted", code=75)
    run.wall += 5000
    run.at(100).life(resumed=True).at(101).say("run_completed", step=10)
    summary = summarize(run.events)
    assert summary.down == pytest.approx(100 - 11.5)
    assert summary.elapsed == pytest.approx(101.0)


def test_a_pause_over_a_reboot_is_wall_time() -> None:
    run = training().say("run_interrupted", code=75)
    run.wall += 600
    run.at(3).life("boot-2", resumed=True).at(5).say("run_completed", step=10)
    summary = summarize(run.events)
    assert summary.down == pytest.approx(600 + 3 - 11.5)
    assert summary.elapsed == pytest.approx(11.5 + summary.down + 2)


def test_a_wall_clock_set_back_over_a_reboot_is_no_negative_pause() -> None:
    run = training().say("run_interrupted", code=75)
    run.wall -= 1e6
    run.at(3).life("boot-2", resumed=True).at(5).say("run_completed", step=10)
    assert summarize(run.events).down == 0.0


def test_a_run_that_goes_on_counts_what_it_has_not_saved_yet() -> None:
    summary = summarize(training().events, alive=True, now=20.0)
    assert summary.state == "training"
    assert summary.elapsed == pytest.approx(20.0)
    assert summary.kept == pytest.approx(20.0 - 1.0 - 0.5)


def test_a_run_that_ended_counts_only_what_it_has_saved() -> None:
    run = training().at(30).say("attempt_ended", attempt=0, step=25, last_step_mono=29.0)
    run.say("run_failed", code=1, reason="it died three times")
    summary = summarize(run.events)
    assert summary.kept == pytest.approx(10.0)
    assert (summary.state, summary.code, summary.reason) == ("failed", 1, "it died three times")


def test_states_follow_the_journal() -> None:
    run = Script().life()
    assert summarize(run.events, alive=True).state == "starting"
    run.attempt(0)
    assert summarize(run.events, alive=True).state == "starting"
    run.both("first_step", attempt=0, step=1)
    assert summarize(run.events, alive=True).state == "training"
    run.fails(0, 5)
    assert summarize(run.events, alive=True).state == "recovering"
    run.attempt(1)
    assert summarize(run.events, alive=True).state == "recovering"
    run.both("first_step", attempt=1, step=1)
    assert summarize(run.events, alive=True).state == "training"
    assert summarize(run.events).state == "dead"
    run.say("run_interrupted", code=75, reason="stopped")
    assert summarize(run.events).state == "interrupted"
    run.life(resumed=True)
    assert summarize(run.events, alive=True).state == "recovering"


def test_a_script_that_reports_no_steps_trains_once_its_ranks_run_and_has_no_goodput() -> None:
    run = Script().life().both("rank_started", pid=1, attempt=0)
    run.say("attempt_started", attempt=0, step=0)
    summary = summarize(run.events, alive=True, now=9.0)
    assert (summary.state, summary.kept, summary.goodput) == ("training", None, None)
    assert summary.step is None
    run.say("attempt_ended", attempt=0, outcome="completed", step=-1).say("run_completed", step=-1)
    assert (summarize(run.events).state, summarize(run.events).step) == ("finished", None)
    run.events[-1] = events.RunFailed(code=1, mono=run.now)
    failed = summarize(run.events)
    assert (failed.state, failed.step, failed.kept, failed.goodput) == ("failed", None, None, None)


def test_a_save_that_a_restart_cut_off_is_no_failed_save() -> None:
    run = Script().life().attempt(0).say("save_cut_off", attempt=0, id="x", step=4, missing=[1])
    assert summarize(run.say("save_failed", attempt=0, step=8).events).save_failures == 1


def test_the_newest_checkpoint_is_not_one_that_was_rejected_since() -> None:
    run = Script().life().attempt(0).save(0, 10).save(0, 20).fails(0, 25)
    run.gate(10, rejected=(20,)).attempt(1, 10, "step-0000000010.a0")
    assert summarize(run.events, alive=True).checkpoint_step == 10


def test_an_empty_journal_is_a_run_of_which_nothing_is_known() -> None:
    summary = summarize([])
    assert (summary.state, summary.attempts, summary.goodput) == ("dead", (), None)


def torn(event: Event, generator: random.Random) -> Event:
    """`event`, perhaps without one of its fields, or with one of another type."""
    if generator.random() < 0.8:
        return event
    line = events.to_record(event)
    key = generator.choice(sorted(set(line) - {"event"}))
    del line[key]
    if generator.random() < 0.5:
        line[key] = generator.choice([None, "x", [1]])
    return events.read(line)


def test_no_journal_makes_it_fail_and_goodput_stays_between_0_and_1() -> None:
    generator = random.Random(7)
    original = killed_once().events
    for _ in range(300):
        told = [torn(e, generator) for e in original if generator.random() > 0.3]
        if generator.random() < 0.3:
            generator.shuffle(told)
        summary = summarize(told, alive=generator.random() < 0.5, now=generator.uniform(0, 40))
        assert summary.goodput is None or 0.0 <= summary.goodput <= 1.0
        assert summary.elapsed >= 0
        assert all(took >= 0 for r in summary.recoveries for _, took in r.phases)


def refused_for_its_job() -> Script:
    """Stopped at step 10 with 5 retired, then started with a job that the gate has nothing for."""
    run = training().save(0, 5).say("pruned", id="step-0000000005.a0")
    run.say("run_interrupted", code=75, reason="stopped", step=10)
    run.at(20).life(resumed=True).gate(None, rejected=(10,))
    return run.say("run_failed", code=90, reason="none is acceptable")


def test_a_start_that_was_refused_for_its_job_is_none_of_the_runs() -> None:
    run = refused_for_its_job()
    assert summarize(run.events).state == "failed"
    assert summarize(run.events).checkpoint_step is None, "what was retired is not the last"
    summary = summarize(run.say("job_kept", reason="none is acceptable").events)
    assert (summary.state, summary.code, summary.reason) == ("interrupted", 75, "stopped")
    assert (summary.step, summary.checkpoint_step) == (10, 10)
    again = run.at(30).life(resumed=True).gate(None, rejected=(10,)).say("run_failed", code=90)
    assert summarize(again.events).checkpoint_step is None, "rejected for the run's own job"


def test_what_a_gate_takes_after_all_is_the_newest_again() -> None:
    run = training().at(20).life(resumed=True).gate(None, rejected=(10,)).say("run_failed", code=90)
    run.at(30).life(resumed=True).gate(10)
    assert summarize(run.events, alive=True).checkpoint_step == 10
