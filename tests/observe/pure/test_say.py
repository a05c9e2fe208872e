from __future__ import annotations

import json
from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.observe.pure import say
from tests.observe.runs import killed_once, verdict


def sentence(line: dict[str, Any]) -> str | None:
    """Of a line of a journal."""
    return say.sentence(events.read(line))


DIGEST = "blake3:" + "ab" * 32


def test_a_gate_says_why_each_checkpoint_was_or_was_not_taken() -> None:
    event = {"event": "gate", "accepted": "x", "verdicts": [verdict(60, False), verdict(40, True)]}
    rejected, accepted = (sentence(event) or "").split("\n")
    assert rejected == (
        "checkpoint step 60 rejected: integrity: rank-00001.pack: chunk 3: "
        "expected blake3:aa, found blake3:bb"
    )
    assert accepted == "checkpoint step 40 accepted (integrity, world size)"


def test_a_gate_without_checkpoints_has_nothing_to_say() -> None:
    assert sentence({"event": "gate", "verdicts": [], "accepted": None}) is None


def test_a_gate_that_takes_nothing_says_so() -> None:
    event = {"event": "gate", "verdicts": [verdict(60, False)], "accepted": None}
    assert (sentence(event) or "").endswith("none of 1 checkpoint is acceptable")


def test_both_values_of_a_failed_check_are_shown() -> None:
    made = events.CheckMade(name="world size", ok=False, expected="2", found="4")
    assert say.check(made) == "world size: expected 2, found 4"


def test_a_job_of_slurm_is_named_with_its_node_and_how_often_it_came_back() -> None:
    event = {"event": "slurm", "job": "12_3", "node": "n1", "restarts": 2}
    assert sentence(event) == "Slurm job 12_3 on n1, requeued 2 times"
    assert sentence({**event, "restarts": 0, "node": ""}) == "Slurm job 12_3"
    limit = {"event": "time_limit", "seconds": 3600.0, "lead": 80.0}
    assert sentence(limit) == "the job's time ends in 60m 00s; the run stops 80.0 s before that"


def test_digests_are_cut_to_what_the_eye_can_compare() -> None:
    event = {"event": "refused", "rank": 1, "step": 60, "reason": f"found {DIGEST}"}
    assert sentence(event) == "rank 1 refused checkpoint step 60: found blake3:abababababab…"


@pytest.mark.parametrize("kind", ["kill", "stop", "exit", "corrupt", "random", "of-the-future"])
def test_drills_are_always_marked(kind: str) -> None:
    event = {"event": "drill", "kind": kind, "rank": 1, "step": 30, "spec": "s", "target": "t"}
    assert (sentence(event) or "").startswith("drill: ")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("host_oom", "out of host memory: rank 1 died"),
        ("killed", "rank 1 died"),
        ("of a newer version", "rank 1 died"),
        (None, "rank 1 died"),
    ],
)
def test_a_failure_names_its_class_where_that_says_more(kind: str | None, expected: str) -> None:
    assert sentence({"event": "failure", "summary": "rank 1 died", "kind": kind}) == expected


def test_a_failure_tells_how_long_its_detection_took() -> None:
    event = {"event": "failure", "summary": "rank 1 died", "mono": 12.038, "cause_mono": 12.0}
    assert sentence(event) == "rank 1 died, detected after 38 ms"


def test_a_save_that_was_asked_for_names_its_step_or_why_there_is_none() -> None:
    event = {"event": "save_requested", "step": 33}
    assert sentence(event) == "saving after step 33, as asked"
    refused = sentence({**event, "step": None, "reason": "the ranks are starting"})
    assert refused == "not saving, though asked: the ranks are starting"


@pytest.mark.parametrize(
    ("missing", "whose"), [([1], "rank 1"), ([1, 3], "ranks 1, 3"), (None, "rank ?")]
)
def test_a_save_that_a_restart_cut_off_is_no_failure(missing: object, whose: str) -> None:
    event = {"event": "save_cut_off", "id": "step-0000000060.a0", "step": 60, "missing": missing}
    assert sentence(event) == f"save of step 60 cut off: {whose} had no snapshot of it yet"


def test_a_run_whose_script_counts_no_steps_is_completed_at_none() -> None:
    event = {"event": "run_completed", "step": -1, "seconds": 11.8}
    assert sentence(event) == "run completed in 11.8 s"
    assert sentence({**event, "step": 0}) == "run completed at step 0 in 11.8 s"


def test_the_interval_comes_with_its_reason() -> None:
    event = {"event": "interval", "seconds": 250.0, "reason": "every 4m10s: a save costs 50ms"}
    assert sentence(event) == "saving every 4m10s: a save costs 50ms"


def test_only_rank_zero_speaks_for_all() -> None:
    event = {"event": "first_step", "step": 41}
    assert sentence({**event, "rank": 0}) == "step 41 is complete: training"
    assert sentence({**event, "rank": 1}) is None


def test_a_restart_names_its_step_and_attempt() -> None:
    event = {"event": "attempt_started", "attempt": 1, "step": 40}
    assert sentence(event) == "restarting from step 40 (attempt 1)"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"action": "restart", "delay": 0}, "restarting at once: x"),
        ({"action": "restart", "delay": 300}, "restarting in 5m 00s: x"),
        ({"action": "roll_back", "delay": 0}, "restarting from an older checkpoint at once: x"),
        ({"action": "pause", "delay": 0, "until": "space"}, "pausing until there is space: x"),
        ({"action": "pause", "until": "storage"}, "pausing until the storage answers: x"),
        ({"action": "smaller", "delay": 0}, "restarting without that rank's GPU at once: x"),
        ({"action": "requeue", "delay": 0}, "ending, to be started again elsewhere: x"),
        ({"action": "give_up", "delay": 0}, "giving up: x"),
    ],
)
def test_every_decision_is_told_with_its_reason(fields: dict[str, Any], text: str) -> None:
    assert sentence({"event": "decision", "reason": "x", **fields}) == text


def test_going_back_and_going_on_without_a_gpu_are_told() -> None:
    assert sentence({"event": "branched", "step": 10}) == "going back to step 10, as asked"
    back = {"event": "branched", "step": 10, "reason": "nan"}
    assert sentence(back) == "going back to step 10: nan"
    out = {"event": "excluded", "rank": 1, "host": "here"}
    assert sentence({**out, "gpu": None}) == "going on without rank 1 on here"
    assert sentence({**out, "gpu": "3"}) == "going on without rank 1's GPU 3 on here"


def test_a_pause_is_told_when_it_begins_and_ends() -> None:
    assert sentence({"event": "paused", "reason": "/x: full"}) == "waiting: /x: full"
    ended = {"event": "pause_ended", "seconds": 7200.0}
    assert sentence({**ended, "problem": ""}) == "going on after 2h 00m"
    assert sentence({**ended, "problem": "full"}) == "no longer waiting, after 2h 00m: full"


def test_unknown_events_are_ignored() -> None:
    assert sentence({"event": "of_the_future", "mono": "?"}) is None


@pytest.mark.parametrize("name", sorted(events.TABLE))
def test_missing_fields_are_tolerated(name: str) -> None:
    sentence({"event": name})


def test_every_event_of_a_run_survives_a_round_trip() -> None:
    for event in killed_once().events:
        line = json.loads(json.dumps(events.to_record(event)))
        assert sentence(line) == say.sentence(event)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 ms"),
        (0.038, "38 ms"),
        (0.9999, "1.00 s"),
        (9.999, "10.0 s"),
        (63.2, "63.2 s"),
        (125.0, "2m 05s"),
        (12_000.0, "3h 20m"),
        (None, "?"),
    ],
)
def test_durations_read_well(value: float | None, text: str) -> None:
    assert say.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_read_well(value: int, text: str) -> None:
    assert say.size(value) == text


def test_many_that_are_refused_for_one_long_reason_are_told_it_once() -> None:
    check = {"name": "model hash", "ok": False, "expected": DIGEST, "found": DIGEST, "detail": "x"}
    refused = [{**verdict(step, False), "checks": [check]} for step in (60, 40, 20)]
    event = {"event": "gate", "verdicts": refused, "accepted": None}
    first, *others, _ = (sentence(event) or "").split("\n")
    assert first.endswith("blake3:abababababab…: x")
    assert others == [
        "checkpoint step 40 rejected: for the same reason",
        "checkpoint step 20 rejected: for the same reason",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("short", "short"),
        ("none is acceptable:\n  step 10\n  step 20", "none is acceptable …"),
        ("word " * 100, "word " * (say.LINE // 5) + "…"),
        ("x" * 1000, "x" * say.LINE + " …"),
    ],
)
def test_what_has_one_line_is_cut_to_one(text: str, line: str) -> None:
    assert say.brief(text) == line
