from __future__ import annotations

import json
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume import events
from autoglm_resume.records import Record

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    arguments = get_args(hint)
    if type(None) in arguments:
        return st.none() | values_of(next(each for each in arguments if each is not type(None)))
    if get_origin(hint) is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if arguments:  # a mapping
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, Record):
        return st.builds(hint, **fields_of(hint))
    return {
        int: st.integers(-(10**17), 10**17),
        float: st.floats(-1e17, 1e17),
        bool: st.booleans(),
        str: st.text(max_size=5),
    }.get(hint, st.integers(0, 9))


def fields_of(record: type[Record]) -> dict[str, st.SearchStrategy[Any]]:
    hints = get_type_hints(record)
    return {name: values_of(hints[name]) for name in record._defaults}


known = st.one_of([st.builds(cls, **fields_of(cls)) for cls in events.TABLE.values()])
FIELDS = sorted({name for cls in events.TABLE.values() for name in cls._defaults} | {"new"})


@given(known)
def test_what_is_written_is_what_is_read(event: events.Event) -> None:
    record = json.loads(json.dumps(events.to_record(event)))
    assert events.read(record) == event
    assert record["event"] == event.event


@given(
    st.sampled_from([*events.TABLE, "of_the_future"]),
    st.dictionaries(st.sampled_from(FIELDS), json_values),
)
def test_no_line_of_a_journal_is_too_damaged_to_be_read(name: str, fields: dict[str, Any]) -> None:
    event = events.read({"event": name, **fields})
    assert json.dumps(events.to_record(event)) is not None
    assert event.time is None or abs(event.time) < 1e18


def test_an_event_of_a_newer_version_is_kept_as_it_is() -> None:
    record = {"event": "of_the_future", "time": 1.5, "attempt": 3, "what": [1]}
    event = events.read(record)
    assert isinstance(event, events.Unknown)
    assert (event.time, event.attempt) == (1.5, 3)
    assert events.to_record(event) == record


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    record = {"event": "first_step", "rank": 1, "step": 7, "new": 1}
    assert events.read(record) == events.FirstStep(rank=1, step=7)


def test_what_an_older_version_did_not_say_has_its_default() -> None:
    started = events.read({"event": "attempt_started", "attempt": 2, "step": 5})
    assert started == events.AttemptStarted(attempt=2, step=5, resume=None, pids={})


@pytest.mark.parametrize(
    "record",
    [
        {"event": "attempt_started", "attempt": 0},
        {"event": "attempt_started", "attempt": 0, "step": "1"},
        {"event": "pruned", "id": None},
        {"event": "committed", "id": "x", "step": True},
        {"event": "committed", "id": "x", "step": float("nan")},
        {"event": "committed", "id": "x", "step": 10**20},
        {"event": "unknown"},
        {"event": "?", "time": "?"},
        {"event": []},
        {},
    ],
)
def test_without_what_it_needs_an_event_is_unknown(record: dict[str, Any]) -> None:
    assert isinstance(events.read(record), events.Unknown)


def test_in_a_list_only_what_is_damaged_is_left_out() -> None:
    record = {"event": "gate", "verdicts": [{"id": "a", "step": "?"}, 7, None]}
    assert events.read(record) == events.GatePassed(verdicts=(events.Judged(id="a"),))


def test_what_goes_without_saying_is_not_written() -> None:
    restart = events.DecisionMade(action="restart", delay=0.5, reason="x", breaker="closed")
    assert events.to_record(restart) == {
        "event": "decision",
        "action": "restart",
        "delay": 0.5,
        "reason": "x",
        "breaker": "closed",
    }
    # A version before this one tells by the key whether something is left to be done.
    back = restart.but(action="roll_back", before=None)
    assert events.to_record(back)["before"] is None


def test_a_name_that_python_has_taken_is_written_without_its_underscore() -> None:
    resharded = events.Resharded(id="a", step=1, from_=2, to=3)
    assert events.to_record(resharded)["from"] == 2
    assert events.read(events.to_record(resharded)).to_json()["from"] == 2


@pytest.mark.parametrize("fields", [{}, {"pid": 1, "pids": 1}])
def test_nothing_is_written_that_has_no_field_here(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="missing or unknown: pid"):
        events.RankStarted(**fields)


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot be changed"):
        events.FirstStep(step=1).step = 2  # type: ignore[misc]


def test_every_event_has_one_name() -> None:
    classes = [cls for cls in vars(events).values() if isinstance(cls, type)]
    told = [c for c in classes if issubclass(c, events.Event) and c.__name__ not in ABSTRACT]
    assert sorted(cls.event for cls in told) == sorted(events.TABLE)


ABSTRACT = ("Event", "OfRank", "Unknown")
