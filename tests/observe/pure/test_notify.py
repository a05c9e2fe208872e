from __future__ import annotations

from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.notify import Context, Message, after, died, message
from tests.observe.runs import Script, killed_once

RUN = Context("/runs/demo", "demo", "r1", "node-7")


def told(journal: list[Event]) -> tuple[list[Message], Context]:
    messages, context = [], RUN
    for event in journal:
        found = message(event, context)
        messages += [found] if found else []
        context = after(event, context)
    return messages, context


def test_a_death_a_recovery_and_the_end_are_told() -> None:
    messages, context = told(killed_once().events)
    assert [each.on for each in messages] == ["started", "failed", "recovered", "completed"]
    _, failed, recovered, completed = (each.body for each in messages)
    assert failed["text"] == "demo on node-7: rank 1 died by SIGKILL at step 6, in backward"
    wanted: dict[str, Any] = {
        **{"state": "recovering", "attempt": 0, "step": 6, "checkpoint_step": 4},
        **{"kind": "killed", "rank": 1, "run": "/runs/demo", "run_id": "r1"},
    }
    assert {key: failed[key] for key in wanted} == wanted
    assert recovered["text"] == "demo on node-7: training again after 1.66 s (step 5)"
    assert (recovered["kind"], recovered["state"]) == ("killed", "training")
    assert completed["text"] == "demo on node-7: run completed at step 10 in ?"
    assert (completed["kind"], completed["state"]) == (None, "finished")
    assert died(context, 0.0) is None


def test_of_a_script_that_counts_no_steps_none_is_told() -> None:
    run = Script().life().both("rank_started", pid=1, attempt=0)
    run.say("attempt_started", attempt=0, step=0)
    messages, context = told(run.fails(0, -1, summary="rank 1 exited with 3").events)
    assert messages[0].body["text"] == "demo on node-7: rank 1 exited with 3"
    completed = message(events.RunCompleted(step=-1, seconds=3.0), context)
    assert completed
    assert completed.body["text"] == "demo on node-7: run completed in 3.00 s"
    assert completed.body["step"] is None


def test_a_recovery_counts_from_the_first_of_several_failures() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7).at(6).attempt(1).at(7).fails(1, -1)
    run.at(8).attempt(2).at(9).both("first_step", attempt=2, step=1)
    messages, _ = told(run.events)
    assert [each.on for each in messages] == ["failed", "failed", "recovered"]
    assert "after 4.00 s" in messages[-1].body["text"]


@pytest.mark.parametrize(
    ("event", "on", "text"),
    [
        (
            {"event": "decision", "action": "pause", "reason": "the disk is full"},
            "paused",
            "demo on node-7: pausing until it can go on: the disk is full",
        ),
        (
            {"event": "straggler", "rank": 3, "ratio": 1.8},
            "straggler",
            "demo on node-7: rank 3 is 1.8 times slower than its peers",
        ),
        (
            {"event": "run_failed", "code": 1, "reason": "spent"},
            "gave_up",
            "demo on node-7: run failed: spent",
        ),
        (
            {"event": "run_interrupted", "code": 75, "reason": "stopped"},
            "interrupted",
            "demo on node-7: interrupted: stopped; continue with: autoglm resume /runs/demo",
        ),
    ],
)
def test_each_occasion_is_one_sentence_and_figures(event: Event, on: str, text: str) -> None:
    found = message(events.read(event), RUN)
    assert found
    assert (found.on, found.body["text"]) == (on, text)
    assert found.body["event"] == on


@pytest.mark.parametrize("name", ["committed", "gate", "warning", "of another version"])
def test_what_changes_no_state_is_not_told(name: str) -> None:
    assert message(events.read({"event": name}), RUN) is None


def test_a_restart_is_no_message_of_its_own() -> None:
    assert message(events.DecisionMade(action="restart", reason="r"), RUN) is None


def test_a_supervisor_that_is_gone_is_told_with_where_it_goes_on() -> None:
    _, context = told(Script().life().attempt(0).save(0, 40).events)
    last = died(context, 12.0)
    assert last
    text = (
        "demo on node-7: its supervisor died; `autoglm resume /runs/demo` continues from step 40"
        " (step 40)"
    )
    assert (last.body["text"], last.body["time"]) == (text, 12.0)


def test_a_run_that_goes_on_after_its_end_is_alive_again() -> None:
    run = Script().life().attempt(0).say("run_interrupted", code=75).life(resumed=True)
    assert died(told(run.events)[1], 0.0) is not None
