"""Which parameter of an optimizer is which."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autoglm_resume.checkpoint.format.parameters import Group, Parameters
from autoglm_resume.worker.state.grouping import differences, orders

members = st.sampled_from(["m.a", "m.b", "m.c", (3,), (3, 4), ()])
groups = st.lists(st.lists(members, max_size=5).map(tuple), max_size=3)


@given(groups, st.randoms())
def test_every_parameter_is_found_where_it_was(saved: list[Group], random: object) -> None:
    now = [tuple(random.sample(group, len(group))) for group in saved]  # type: ignore[attr-defined]
    found = orders(saved, now)
    if found is not None:
        for order, before, group in zip(found, saved, now, strict=True):
            assert sorted(order) == list(range(len(group)))
            assert tuple(before[place] for place in order) == group
    else:
        assert "the same shape and no name" in "".join(differences(saved, now))


@given(groups, groups)
def test_there_is_an_order_or_a_difference(saved: list[Group], now: list[Group]) -> None:
    assert (orders(saved, now) is None) == bool(differences(saved, now))


def test_parameters_in_the_order_that_they_had_need_no_names() -> None:
    assert orders([((3,), (3,), "a")], [((3,), (3,), "a")]) == [(0, 1, 2)]
    assert orders([((3,), (4,), "a")], [("a", (4,), (3,))]) == [(2, 1, 0)]
    assert orders([((3,), (3,), "a")], [("a", (3,), (3,))]) is None


@pytest.mark.parametrize(
    ("saved", "now", "says"),
    [
        (
            [("m.a", "m.b", "m.c")],
            [("m.b", (3, 4))],
            "group 0: expected 3 parameters, found 2; only in the checkpoint: m.a, m.c; only in"
            " this script: one of shape [3, 4] without a name",
        ),
        (
            [("m.a",), ("m.b",)],
            [("m.a",)],
            "expected 2 groups of parameters, found 1; group 1: expected 1 parameter, found 0;"
            " only in the checkpoint: m.b",
        ),
        ([("a",), ("b",)], [("b",), ("a",)], "only in the checkpoint: a; only in this script: b"),
        ([tuple(f"m.{n}" for n in range(20))], [()], "m.6, m.7 and 12 more"),
    ],
)
def test_other_parameters_are_named(saved: list[Group], now: list[Group], says: str) -> None:
    assert orders(saved, now) is None
    assert says in "; ".join(differences(saved, now))


@given(groups)
def test_what_is_known_of_parameters_comes_back_as_it_was_written(found: list[Group]) -> None:
    known = Parameters({"optimizer": tuple(found)}, {"optimizer": 1}, ("m.a",), ("m.b",))
    assert Parameters.from_json(known.to_json()) == known
