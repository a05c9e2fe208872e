from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.failures import Kind
from autoglm_resume.journal import decode, encode
from autoglm_resume.observe.pure.explain import Story, explain, frames, line_of, state
from autoglm_resume.observe.pure.say import concluded
from tests.observe.runs import Script, killed_once

TRACEBACK = """Traceback (most recent call last):
  File "/opt/autoglm_resume/worker/rank.py", line 3, in main
    run()
  File "/home/u/train.py", line 31, in step
    loss.backward()
    ^^^^^^^^^^^^^^^
  File "/v/lib/python3.11/site-packages/torch/_tensor.py", line 5, in backward
    raise
RuntimeError: no
"""


def told(story: Story) -> dict[str, str]:
    return dict(story.paragraph)


def only(run: Script) -> Story:
    return explain(run.events).stories[0]


def test_a_killed_rank_is_told_from_its_death_to_the_next_step() -> None:
    run = killed_once()
    run.events[1] = run.events[1].but(host="node-7")
    first, second = explain(run.events).stories
    text = told(first)
    assert first.title == "attempt 0, from step 0: failed at step 6 after 6.60 s"
    assert text["failed"] == (
        "rank 1 died by SIGKILL at step 6, in backward on node-7, "
        "ordered by --drill kill:rank=1,step=6"
    )
    assert text["done"].startswith("restarting at once: it had made progress; attempt 1 took")
    assert "step 4 (the newest, accepted on integrity, world size)" in text["done"]
    assert text["cost"].startswith("1.70 s until the next step: detect 40 ms, stop 60 ms")
    assert text["cost"].endswith("2 steps run again, about 2.10 s of training")
    assert second.title == "attempt 1, from step 4: completed at step 10 after 6.80 s"
    assert second.paragraph == []


def test_a_traceback_points_to_the_users_own_line() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7, kind="exception", traceback=TRACEBACK)
    assert told(only(run))["line"] == "/home/u/train.py:31 in step: loss.backward() (traceback)"


def test_an_exception_that_is_none_of_the_users_points_to_its_innermost_line() -> None:
    lines = TRACEBACK.replace("/home/u/", "/v/site-packages/")
    found = line_of(events.GroupFailed(traceback=lines))
    assert found
    assert found.place.endswith("_tensor.py:5 in backward")


def test_a_hang_points_to_the_users_line_of_the_suspect_and_to_what_it_waits_in() -> None:
    stacks = {
        "0": ["other.py:1 in f"],
        "1": ["/v/site-packages/torch/x.py:9 in all_reduce", "train.py:31 in step"],
    }
    run = Script().life().attempt(0).at(5).fails(0, 7, kind="hang", stacks=stacks)
    line = told(only(run))["line"]
    assert line == "train.py:31 in step: inside /v/site-packages/torch/x.py:9 in all_reduce (stack)"


def test_without_a_traceback_the_last_line_of_the_log_is_shown() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 7, kind="exited", tail="one\n two \n\n")
    assert told(only(run))["line"] == "two (log)"


def test_a_place_that_is_no_line_is_not_shown_as_one() -> None:
    assert line_of(events.GroupFailed(place="SIGKILL at step 20, in backward")) is None
    found = line_of(events.GroupFailed(place="train.py:31 in step"))
    assert found
    assert found.place == "train.py:31 in step"


@pytest.mark.parametrize("kind", [*Kind, "supervisor", "of_a_later_version"])
def test_every_class_is_told_in_words_with_its_evidence(kind: Kind | str) -> None:
    name = kind.value if isinstance(kind, Kind) else kind
    run = Script().life().attempt(0).fails(0, 7, kind=name, evidence=["this", "that"])
    text = told(only(run))["concluded"]
    assert text == f"{name}: {concluded(name)}. Because this; that"
    assert "_" not in concluded(name)


def test_what_was_rejected_is_told_with_the_failure_that_needed_it() -> None:
    run = Script().life().attempt(0).at(5).fails(0, 70).gate(40, rejected=(60,))
    run.attempt(1, 40, "step-0000000040.a0").at(8).both("first_step", attempt=1, step=41)
    first, second = explain(run.events).stories
    assert "the newest acceptable" in told(first)["done"]
    assert "checkpoint step 60 rejected: integrity: rank-00001.pack" in told(first)["done"]
    assert second.rejected == ()


def test_what_was_rejected_after_an_interruption_is_told_at_the_beginning() -> None:
    run = Script().life().attempt(0).say("attempt_ended", attempt=0, outcome="interrupted")
    run.say("stop_requested", attempt=0, by="SIGTERM")
    run.life(resumed=True).gate(40, rejected=(60,)).attempt(1, 40, "step-0000000040.a0")
    first, second = explain(run.events).stories
    assert told(first)["done"] == "it was asked to stop by SIGTERM"
    assert "checkpoint step 60 rejected" in told(second)["began"]


def test_a_gate_that_nobody_passed_is_told_too() -> None:
    run = Script().life().gate(None, rejected=(60, 40))
    run.say("run_failed", code=90, reason="none of 2 checkpoints is acceptable")
    explained = explain(run.events)
    assert [no.step for no in explained.pending] == [60, 40]
    assert explained.now == "stopped: none of 2 checkpoints is acceptable (exit code 90)"


def test_what_was_noticed_on_the_way_is_told_once_with_its_count() -> None:
    run = Script().life().attempt(0)
    for _ in range(3):
        run.say("straggler", attempt=0, rank=1, ratio=1.8)
    assert only(run).paragraph == [
        ("noticed", "rank 1 is 1.8 times slower than its peers (3 times)")
    ]


def test_a_node_of_the_failing_rank_is_better_known_than_the_supervisors() -> None:
    run = Script().life().attempt(0).fails(0, 7, ranks=[{"rank": 0}, {"rank": 1, "node": "n2"}])
    assert only(run).node == "n2"


def decided(action: str, **fields: Any) -> Script:
    run = Script().life().attempt(0).both("first_step", attempt=0, step=1).fails(0, 7)
    return run.say("decision", attempt=0, action=action, delay=0.0, **fields)


@pytest.mark.parametrize(
    ("run", "alive", "now"),
    [
        (killed_once(), False, "done at step 10"),
        (Script(), False, "stopped: its supervisor died before the first attempt"),
        (Script().life(), True, "starting"),
        (
            Script().life().attempt(0).both("first_step", attempt=0, step=812),
            True,
            "training at step 812",
        ),
        (
            decided("restart", reason="r").attempt(1).both("first_step", attempt=1, step=9),
            True,
            "training at step 9, after 1 failure",
        ),
        (
            decided("restart", reason="it had made progress"),
            True,
            "recovering: restarting at once: it had made progress; "
            "after: rank 1 died by SIGKILL at step 7, in backward",
        ),
        (
            decided("pause", reason="the disk is full").life(resumed=True),
            True,
            "recovering: after: rank 1 died by SIGKILL at step 7, in backward",
        ),
        (
            decided("pause", reason="the disk is full"),
            True,
            "paused: pausing until it can go on: the disk is full; "
            "after: rank 1 died by SIGKILL at step 7, in backward",
        ),
        (
            decided("give_up", reason="r").say("run_failed", code=1, reason="spent"),
            False,
            "stopped at step 7: spent (exit code 1)",
        ),
        (
            Script().life().attempt(0).save(0, 4).say("run_interrupted", code=75, reason="asked"),
            False,
            "stopped at step 4: asked (exit code 75)",
        ),
        (
            Script().life().attempt(0).save(0, 4),
            False,
            "stopped at step 4: its supervisor died; `autoglm resume` continues from step 4",
        ),
    ],
)
def test_how_a_run_is_fits_one_sentence(run: Script, alive: bool, now: str) -> None:
    assert explain(run.events, alive=alive).now == now


def test_heartbeats_know_the_step_better_than_the_journal() -> None:
    run = Script().life().attempt(0).both("first_step", attempt=0, step=1)
    assert state(explain(run.events, alive=True).summary, 812) == "training at step 812"


def test_a_torn_traceback_has_the_frames_that_are_there() -> None:
    assert frames(TRACEBACK[TRACEBACK.index("File") : TRACEBACK.index("loss")]) == [
        ("/opt/autoglm_resume/worker/rank.py:3 in main", "run()"),
        ("/home/u/train.py:31 in step", ""),
    ]
    assert frames("no traceback") == []


WHOLE = killed_once().events + decided("give_up", reason="r").events
JUNK = (None, True, -1, 3, 2.5, float("nan"), float("inf"), "", "text", [], [None], {}, {"a": 1})
LINES = [events.to_record(event) for event in WHOLE]
KEYS = sorted({key for line in LINES for key in line})


@st.composite
def damaged(draw: st.DrawFn) -> list[Event]:
    """A journal that lost lines and keys, or has values of another version."""
    places = st.integers(0, len(WHOLE) - 1)
    lost = draw(st.sets(places, max_size=12))
    lines = [dict(line) for line in LINES]
    for n, key in draw(st.lists(st.tuples(places, st.sampled_from(KEYS)), max_size=12)):
        value = draw(st.sampled_from(JUNK))
        if key == "event":
            value = str(value)
        lines[n][key] = value
    return [events.read(line) for n, line in enumerate(lines) if n not in lost]


@given(damaged(), st.booleans())
def test_a_damaged_journal_is_told_as_far_as_it_goes(told: list[Event], alive: bool) -> None:
    explained = explain(told, alive=alive)
    assert explained.now
    for story in explained.stories:
        assert story.title
        assert all(isinstance(text, str) for pair in story.paragraph for text in pair)


@pytest.mark.parametrize("cut", range(0, 6000, 97))
def test_a_journal_cut_anywhere_is_told_as_far_as_it_goes(cut: int) -> None:
    data = b"".join(map(encode, WHOLE))
    assert explain(decode(data[:cut])).now
    json.dumps([story.title for story in explain(decode(data[cut:])).stories])
