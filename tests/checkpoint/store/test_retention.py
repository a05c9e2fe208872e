from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autoglm_resume.checkpoint.store.retention import (
    KeepBest,
    KeepRules,
    RetentionEntry,
    doomed,
    explain,
)

NOW = 1_700_000_000.0
DAY = 86_400.0
NOTHING: frozenset[str] = frozenset()


def saved(step: int, *needs: int, age: float = 100 * DAY, **metrics: float) -> RetentionEntry:
    return RetentionEntry(
        f"c{step}", step, NOW - age, metrics, frozenset(f"c{need}" for need in needs), 1000
    )


def left_behind(step: int, *needs: int, **figures: float) -> RetentionEntry:
    return replace(saved(step, *needs, **figures), given_up=True)


FIVE = [saved(step) for step in (5, 4, 3, 2, 1)]


def gone(
    candidates: Sequence[RetentionEntry], keep: KeepRules, *protected: str, pruning: bool = False
) -> set[str]:
    return set(doomed(candidates, keep, frozenset(protected), NOW, pruning=pruning))


def test_the_last_ones_stay() -> None:
    assert gone(FIVE, KeepRules(last=2)) == {"c1", "c2", "c3"}


def test_steps_that_are_divisible_stay_for_ever() -> None:
    assert gone(FIVE, KeepRules(last=1, every_steps=2)) == {"c1", "c3"}


def test_what_is_young_stays() -> None:
    ages = [saved(n, age=age) for n, age in ((3, 0.0), (2, DAY), (1, 2 * DAY))]
    assert gone(ages, KeepRules(last=1, for_seconds=2 * DAY)) == {"c1"}


def test_a_checkpoint_from_the_future_counts_as_young() -> None:
    assert gone([saved(2), saved(1, age=-DAY)], KeepRules(last=1, for_seconds=1.0)) == set()


@pytest.mark.parametrize(
    ("best", "stays"), [(KeepBest("loss", 2), {"c2", "c3"}), (KeepBest("loss", 1, "max"), {"c1"})]
)
def test_the_best_stay(best: KeepBest, stays: set[str]) -> None:
    losses = [saved(n, loss=loss) for n, loss in ((4, 3.0), (3, 2.5), (2, 2.0), (1, 9.0))]
    assert gone(losses, KeepRules(last=1, best=best)) == {"c1", "c2", "c3"} - stays


@pytest.mark.parametrize(
    "metrics", [{}, {"accuracy": 1.0}, {"loss": math.nan}, {"loss": -math.inf}]
)
def test_what_has_no_such_figure_is_not_among_the_best(metrics: dict[str, float]) -> None:
    unknown = [saved(3, loss=2.0), saved(2, **metrics), saved(1, loss=1.0)]
    assert gone(unknown, KeepRules(last=1, best=KeepBest("loss", 2))) == {"c2"}


def test_of_equally_good_ones_the_newest_counts() -> None:
    equal = [saved(n, loss=1.0) for n in (4, 3, 2)]
    assert gone(equal, KeepRules(last=1, best=KeepBest("loss", 2))) == {"c2"}


def test_what_a_kept_one_needs_stays_through_every_link_of_the_chain() -> None:
    chain = [saved(5, 4), saved(4, 2), saved(3, 1), saved(2), saved(1)]
    assert gone(chain, KeepRules(last=1)) == {"c3", "c1"}


def test_a_checkpoint_goes_before_the_one_it_needs() -> None:
    assert doomed([saved(3), saved(2, 1), saved(1)], KeepRules(last=1), NOTHING, NOW) == [
        "c2",
        "c1",
    ]


BRANCHED = [
    left_behind(40, loss=0.1),
    left_behind(30, loss=0.2),
    saved(25, 10, loss=3.0),
    saved(20, loss=2.0),
    saved(10, loss=4.0),
]


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (KeepRules(last=2), {"c25", "c20", "c10"}),
        (KeepRules(last=1, best=KeepBest("loss", 1)), {"c40", "c25", "c20", "c10"}),
        (KeepRules(last=1, every_steps=20), {"c25", "c20", "c10"}),
        (KeepRules(last=5), {"c25", "c20", "c10"}),
        (KeepRules(last=1, for_seconds=101 * DAY), {"c40", "c30", "c25", "c20", "c10"}),
    ],
)
def test_a_branch_that_was_given_up_takes_no_place_of_the_present_one(
    keep: KeepRules, stays: set[str]
) -> None:
    ids = {each.id for each in BRANCHED}
    assert gone(BRANCHED, keep, pruning=True) == ids - stays
    assert gone(BRANCHED, keep) == ids - stays - {"c40", "c30"}


def test_where_only_a_given_up_branch_is_left_its_newest_stays() -> None:
    left = [left_behind(2), left_behind(1)]
    assert gone(left, KeepRules(last=1), pruning=True) == {"c1"}


def test_what_a_branch_left_behind_stays_until_a_person_prunes_and_says_so() -> None:
    left = [saved(3), left_behind(2, 1), saved(1)]
    assert gone(left, KeepRules(last=1)) == set()
    why = explain(left, KeepRules(last=1), NOTHING, NOW)
    assert why["c2"] == ("of a branch that was left; `autoglm prune` may delete it",)
    assert why["c1"] == ("needed by c2",)
    assert gone(left, KeepRules(last=1), pruning=True) == {"c1", "c2"}


def test_the_best_of_all_stays_beside_the_best_of_the_present_branch() -> None:
    best = KeepRules(last=1, best=KeepBest("accuracy", 1, "max"))
    runs = [
        saved(5, accuracy=0.5),
        saved(4, accuracy=0.7),
        left_behind(3, accuracy=0.9),
        left_behind(2, accuracy=0.8),
    ]
    assert gone(runs, best, pruning=True) == {"c2"}


def test_what_is_needed_but_not_there_is_no_trouble() -> None:
    assert gone([saved(2, 1)], KeepRules(last=1)) == set()


def test_nothing_goes_when_there_is_nothing() -> None:
    assert doomed([], KeepRules(), NOTHING, NOW) == []


def test_each_is_told_why_it_stays() -> None:
    candidates = [
        saved(7, 6, loss=2.5, age=0.0),
        saved(6, loss=2.31),
        saved(5, loss=2.4),
        saved(4),
        saved(3),
    ]
    keep = KeepRules(last=1, every_steps=4, best=KeepBest("loss", 2), for_seconds=2 * DAY)
    assert explain(candidates, keep, frozenset(["c3"]), NOW) == {
        "c7": ("the newest", "younger than 2 d"),
        "c6": ("best loss 2.31",),
        "c5": ("2nd best loss 2.4",),
        "c4": ("step divisible by 4",),
        "c3": ("accepted last",),
    }
    assert explain(candidates, KeepRules(last=2), NOTHING, NOW) == {
        "c7": ("one of the last 2",),
        "c6": ("one of the last 2",),
        "c5": (),
        "c4": (),
        "c3": (),
    }
    assert explain(candidates, KeepRules(last=1), NOTHING, NOW)["c6"] == ("needed by c7",)


@pytest.mark.parametrize(
    ("seconds", "said"), [(45.0, "45 s"), (90.0, "1.5 min"), (7200.0, "2 h"), (10 * DAY, "10 d")]
)
def test_how_young_is_said_in_a_fitting_unit(seconds: float, said: str) -> None:
    why = explain([saved(1, age=0.0)], KeepRules(for_seconds=seconds), NOTHING, NOW)
    assert f"younger than {said}" in why["c1"]


@pytest.mark.parametrize("place", ["2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd"])
def test_places_are_counted_as_people_do(place: str) -> None:
    many = [saved(n, loss=float(n)) for n in range(30, 0, -1)]
    reasons = explain(many, KeepRules(best=KeepBest("loss", 30)), NOTHING, NOW)
    assert f"{place} best loss {place[:-2]}" in reasons[f"c{place[:-2]}"]


keeps = st.builds(
    KeepRules,
    last=st.integers(-1, 5),
    every_steps=st.none() | st.integers(1, 5),
    best=st.none()
    | st.builds(
        KeepBest, metric=st.just("loss"), n=st.integers(1, 3), mode=st.sampled_from(["min", "max"])
    ),
    for_seconds=st.none() | st.floats(0, 20),
)


@st.composite
def chains(draw: st.DrawFn) -> list[RetentionEntry]:
    """Newest first; each may need some of the older ones."""
    found: list[RetentionEntry] = []
    for step in range(draw(st.integers(0, 9))):
        older = [each.id for each in found]
        needs = draw(st.frozensets(st.sampled_from(older), max_size=3)) if older else NOTHING
        losses = draw(st.just({}) | st.fixed_dictionaries({"loss": st.floats()}))
        created, given_up = NOW - draw(st.floats(-1, 20)), draw(st.booleans())
        found.append(RetentionEntry(f"c{step}", step, created, losses, needs, given_up=given_up))
    return found[::-1]


PROTECTED = st.frozensets(st.sampled_from([f"c{n}" for n in range(10)]), max_size=3)


@given(chains(), keeps, PROTECTED)
def test_the_newest_and_the_protected_never_go(
    candidates: list[RetentionEntry], keep: KeepRules, protected: frozenset[str]
) -> None:
    deleted = doomed(candidates, keep, protected, NOW)
    present = [each for each in candidates if not each.given_up] or candidates
    assert not {each.id for each in present[: max(1, keep.last)]} & set(deleted)
    assert not protected & set(deleted)


@given(chains(), keeps, PROTECTED)
def test_wherever_deleting_is_cut_short_nothing_lacks_what_it_needs(
    candidates: list[RetentionEntry], keep: KeepRules, protected: frozenset[str]
) -> None:
    deleted = doomed(candidates, keep, protected, NOW)
    for count in range(len(deleted) + 1):
        left = {each.id for each in candidates} - set(deleted[:count])
        assert all(each.needs <= left for each in candidates if each.id in left)


@given(chains(), keeps, PROTECTED)
def test_only_what_no_rule_keeps_goes_and_all_of_it(
    candidates: list[RetentionEntry], keep: KeepRules, protected: frozenset[str]
) -> None:
    why = explain(candidates, keep, protected, NOW)
    deleted = set(doomed(candidates, keep, protected, NOW))
    assert {id for id, reasons in why.items() if not reasons} == deleted
    # Without the links nothing more stays than the rules want.
    alone = [replace(each, needs=NOTHING) for each in candidates]
    wanted = {id for id, reasons in explain(alone, keep, protected, NOW).items() if reasons}
    needed = {id for id, reasons in why.items() if any(r.startswith("needed by") for r in reasons)}
    assert set(why) - deleted == wanted | needed
    by_id = {each.id: each for each in candidates}
    for id in needed:
        (reason,) = why[id]
        assert id in by_id[reason.removeprefix("needed by ")].needs


@given(keeps)
def test_it_travels_as_json(keep: KeepRules) -> None:
    assert KeepRules.from_json(json.loads(json.dumps(asdict(keep)))) == keep
