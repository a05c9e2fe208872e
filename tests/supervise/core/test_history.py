from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import events, journal
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.structure import Structure, combined
from autoglm_resume.events import Event
from autoglm_resume.failures import Kind
from autoglm_resume.supervise.core.failure import Previous
from autoglm_resume.supervise.core.history import (
    Exclusion,
    History,
    Model,
    Pending,
    heard,
    model_of,
    recall,
    skipped,
)
from autoglm_resume.supervise.core.policy import Ended

MODEL = Structure.of([("w", "float32", (2, 3))])
OTHER = Structure.of([("w", "float32", (2, 4))])


def event(name: str, **fields: Any) -> Event:
    return events.read({"event": name, "time": 1000.0, **fields})


def test_an_empty_journal_is_a_run_that_was_never_started() -> None:
    assert recall([]) == History()
    assert not recall([]).finished


def test_a_run_is_recalled() -> None:
    past = recall(
        [
            event("run_started", run_id="abc"),
            event("attempt_started", attempt=0, step=0, time=10.0),
            event("model", rank=0, hash=MODEL.hash, model=MODEL.to_json()),
            event("imports", rank=0, modules=["x", "y"]),
            event("committed", step=10, objects={"model": "d10"}),
            event("failure", step=14),
            event("attempt_ended", time=30.0),
            event("attempt_started", attempt=1, step=10, time=40.0),
            event("imports", rank=0, modules=["y", "z"]),
            event("committed", step=20, objects={"model": "d20"}),
            event("committed", step=15, objects={"model": "d15"}),
            event("failure", step=25),
            event("attempt_ended", time=45.5),
        ]
    )
    assert past.run_id == "abc"
    assert past.attempts == 2
    assert past.ended == (Ended(0, 14, 10, time=1000.0), Ended(10, 25, 20, time=1000.0))
    assert (past.checkpointed, past.objects) == (20, {"model": "d20"})
    assert (past.failures, past.trained) == (2, 25.5)
    assert past.imports == ("x", "y", "z")
    model = model_of(past.models, 2)
    assert model is not None
    assert model.structure == MODEL
    assert not past.finished


def test_a_finished_run_that_went_on_from_an_older_checkpoint_is_not_finished() -> None:
    finished = [event("run_completed", step=20)]
    assert recall(finished).finished
    past = recall([*finished, event("branched", step=10, attempt=3)])
    assert (past.finished, past.branches, past.checkpointed) == (False, ((10, 3),), 10)


def test_a_start_that_was_refused_for_its_job_spoils_nothing() -> None:
    told = [
        event("attempt_started", attempt=0, step=0),
        event("failure", step=6, kind="killed", place="here"),
        event("excluded", host="a", rank=1),
    ]
    before = recall(told)
    told += [event("supervisor_started"), event("run_failed", code=90)]
    assert not recall(told).ended
    past = recall([*told, event("job_kept")])
    assert before.ended
    assert (past.ended, past.previous) == (before.ended, before.previous)
    assert past.excluded == before.excluded


def test_a_finished_run_goes_on_with_another_job_unless_that_is_refused() -> None:
    over = [event("run_started", run_id="abc"), event("run_completed", step=10)]
    changed = [*over, event("job_changed", finished=True), event("supervisor_started")]
    assert not recall(changed).finished
    assert recall(
        [*changed, event("run_failed", code=2), event("job_kept", finished=True)]
    ).finished
    assert recall([*changed, event("run_completed", step=20)]).finished


def test_what_is_skipped_is_so_of_the_checkpoints_that_were_there() -> None:
    began = [event("run_started", run_id="abc"), event("attempt_started", attempt=0, step=0)]
    past = recall([*began, event("job_changed", skip=["scheduler"])])
    asked = ("scheduler", "optimizer.settings")
    assert skipped(past, asked, checkpoint_id(10, "a0")) == ("scheduler",)
    assert skipped(past, asked, checkpoint_id(12, "a1")) == ()
    assert skipped(past, asked, None) == ()
    assert skipped(past, (), checkpoint_id(10, "a0")) == ()
    alone = checkpoint_id(10, "imported")
    assert skipped(recall(began), asked, alone) == asked, "it was no attempt's"


def test_a_run_that_was_given_up_gets_a_new_budget() -> None:
    past = recall(
        [
            event("attempt_started", attempt=0, step=0),
            event("committed", step=5, objects={}),
            event("failure", step=6),
            event("run_failed", code=1),
            event("attempt_started", attempt=1, step=5),
            event("failure", step=7),
        ]
    )
    assert past.ended == (Ended(5, 7, 5, time=1000.0),)


def test_a_refusal_is_remembered_over_a_restart_of_the_supervisor() -> None:
    past = recall(
        [
            event("attempt_started", attempt=0, step=30),
            event("failure", step=-1, refused="step-0000000030.a0"),
        ]
    )
    assert past.ended == (Ended(30, -1, 0, refused="step-0000000030.a0", time=1000.0),)


def test_what_failed_where_and_how_it_was_answered_is_remembered() -> None:
    past = recall(
        [
            event("attempt_started", attempt=0, step=0),
            event("failure", step=3, kind="hang", place="train.py:3 in f", time=7.0),
            event("decision", action="restart", delay=2.0, reason="x", time=8.0),
            event("attempt_started", attempt=1, step=0),
            event("failure", step=3, kind="of a newer version"),
            event("decision", action="requeue", delay=0, reason="y"),
        ]
    )
    first = Ended(0, 3, 0, None, None, Kind.HANG, "train.py:3 in f", 7.0, "restart")
    assert past.ended == (first, Ended(0, 3, 0, time=1000.0, action="requeue"))


def test_a_wait_that_was_cut_short_is_pending_until_somebody_starts_or_stops_the_run() -> None:
    waiting = [
        event("failure", step=3),
        event("decision", action="pause", delay=0, reason="full", until="space", time=9.0),
    ]
    assert recall(waiting).pending == Pending("pause", 0.0, "full", 9.0, "space")
    for end in (
        event("attempt_started", attempt=1, step=0),
        event("run_interrupted", code=75),
        event("run_failed", code=1),
    ):
        assert recall([*waiting, end]).pending is None


@pytest.mark.parametrize(
    ("decided", "carried_out"),
    [
        ({"action": "roll_back", "before": 7}, event("branched", step=5, attempt=1, reason="x")),
        ({"action": "roll_back", "before": None}, event("branched", step=5, attempt=1, reason="x")),
        ({"action": "smaller", "rank": 1}, event("excluded", rank=1, gpu=None, host="here")),
    ],
)
def test_what_was_decided_and_not_carried_out_is_known(
    decided: dict[str, Any], carried_out: Event
) -> None:
    decision = event("decision", delay=0.5, reason="x", **decided)
    pending = recall([event("failure", step=3), decision]).pending
    assert pending is not None
    assert not pending.done
    assert pending.before == decided.get("before")
    assert pending.rank == decided.get("rank", -1)
    left = recall([event("failure", step=3), decision, carried_out]).pending
    assert left is not None
    assert left.done
    assert left.delay == 0.5


def test_exclusions_last_until_the_run_is_given_up() -> None:
    out = event("excluded", rank=1, gpu="3", host="here")
    assert recall([out, out]).excluded == (Exclusion("here", 1, "3"),) * 2
    assert recall([out, event("run_interrupted", code=75)]).excluded
    assert not recall([out, event("run_failed", code=1)]).excluded


def test_going_back_is_a_new_beginning_only_if_a_person_asked_for_it() -> None:
    failed = [event("attempt_started", attempt=0, step=20), event("failure", step=25)]
    assert recall([*failed, event("branched", step=10, attempt=1, reason="nan")]).ended
    assert not recall([*failed, event("branched", step=10, attempt=1)]).ended


def test_the_last_failure_is_remembered_until_the_run_is_given_up() -> None:
    failed = event("failure", step=14, place="train.py:31 in step")
    assert recall([event("failure", step=9), failed]).previous == Previous(
        "train.py:31 in step", 14
    )
    assert recall([event("failure", step=9)]).previous == Previous("", 9)
    assert recall([failed, event("run_failed", code=1)]).previous is None


def test_a_completed_run_is_finished() -> None:
    assert recall([event("run_started", run_id="a"), event("run_completed", step=9)]).finished


def reported(rank: int, of: Structure, attempt: int = 0) -> Event:
    structure = of.to_json() if rank == 0 else None
    return event("model", rank=rank, hash=of.hash, model=structure, attempt=attempt)


def saved_by(attempt: int, step: int = 10) -> Event:
    return event("committed", id=checkpoint_id(step, f"a{attempt}"), step=step)


def test_the_model_is_that_of_all_ranks_as_last_reported() -> None:
    first = [reported(rank, MODEL) for rank in (0, 1)]
    changed = reported(1, OTHER)
    model = model_of(recall([*first, changed, saved_by(0)]).models, 2)
    assert model is not None
    assert model.hash == combined([MODEL.hash, OTHER.hash])
    assert model.structure == MODEL
    before = model_of(recall([*first, saved_by(0)]).models, 2)
    assert model != before
    assert model_of({}, 2) is None
    stages = {1: Model(OTHER.hash, None), 0: Model(MODEL.hash, MODEL)}
    assert model_of(stages, 3) is None, "what the third stage is like is not known"
    assert model_of({0: stages[0]}, 2) == before, "replicas are alike"
    assert model_of({**stages, 7: Model("of a larger run", None)}, 2) == model
    swapped = model_of(stages, 2)
    assert swapped == model, "the order in which ranks reported does not matter"


def test_only_a_model_that_trained_up_to_a_checkpoint_is_that_of_the_run() -> None:
    story = [reported(0, MODEL), saved_by(0)]
    assert recall(story[:1]).models == {}
    assert recall(story).models == {0: Model(MODEL.hash, MODEL)}
    story += [reported(0, OTHER, attempt=1)]
    assert recall(story).models[0].hash == MODEL.hash, "attempt 1 may have been refused"
    late = [*story, saved_by(0, step=20)]
    assert recall(late).models[0].hash == MODEL.hash, "which a saver of attempt 0 said later"
    assert recall([*story, saved_by(1, step=20)]).models[0].hash == OTHER.hash
    older = [*story, saved_by(1, step=5)]
    assert recall(older).models[0].hash == OTHER.hash, "as of a branch"


def test_ranks_that_have_become_others_say_nothing_of_those_that_are_silent() -> None:
    old, new = Model(MODEL.hash, MODEL), Model(OTHER.hash, OTHER)
    assert heard({0: old, 1: old}, {0: old}) == {0: old, 1: old}
    assert heard({0: old, 1: old}, {0: new}) == {0: new}
    assert heard({0: new}, {0: new, 1: new}) == {0: new, 1: new}
    assert heard({0: old}, {1: new}) == {0: old, 1: new}, "a pipeline's second stage"


def test_unknown_events_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [
        journal.encode(event("run_started", run_id="a")),
        journal.encode(event("written_by_a_newer_version", step="?")),
        journal.encode(event("committed", step=10, objects={}))[:20] + b"\n",
        b"[1, 2]\n",
        b'{"no": "event"}\n',
        b"\xff\xfe\n",
        journal.encode(event("attempt_started", attempt=3, step=0)),
        journal.encode(event("committed", step=99, objects={}))[:-5],
    ]
    path.write_bytes(b"".join(lines))
    past = recall(journal.read(path))
    assert (past.run_id, past.attempts, past.checkpointed) == ("a", 4, 0)


@pytest.mark.parametrize(
    "partial",
    [
        event("run_started"),
        event("failure"),
        event("run_completed"),
        event("run_failed"),
        event("attempt_started"),
        event("model"),
        event("imports"),
        event("committed"),
        event("committed", step="ten", objects={}),
        event("model", rank=0, hash="x", model=[1]),
    ],
    ids=repr,
)
def test_an_event_without_its_fields_does_not_stop_a_resume(partial: Event) -> None:
    whole = [event("run_started", run_id="a"), event("attempt_started", attempt=2, step=0)]
    past = recall([whole[0], partial, whole[1]])
    assert (past.run_id, past.attempts) == ("a", 3)
