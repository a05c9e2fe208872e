from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.store.gate import (
    Candidate,
    Expectation,
    Integrity,
    Verdict,
    agree,
    choose,
    could_fit,
    judge,
)

MODEL = Structure.of([("model.w", "float32", (128, 64))])
OTHER = Structure.of([("model.w", "float32", (128, 32))])
RENAMED = Structure.of([("model.v", "float32", (128, 64))])
GOOD = Candidate(
    id="step-0000000030.a1",
    step=30,
    path="/c/step-0000000030.a1",
    created=1.0,
    world_size=2,
    model_hash=MODEL.hash,
    model=MODEL,
    integrity=Integrity(True, "fingerprint"),
    raw=10,
    stored=8,
)
EXPECTED = Expectation(world_size=2, model_hash=MODEL.hash, model=MODEL)
TORN = Integrity(False, "content", "rank-00000.pack: expected 8 bytes, found 7")
NEWER = Integrity(False, "fingerprint", "format 2", unreadable=True)


@pytest.mark.parametrize(
    ("facts", "expectation", "accepted", "corrupt", "says"),
    [
        (GOOD, EXPECTED, True, False, "verified by fingerprint"),
        (replace(GOOD, integrity=TORN), EXPECTED, False, True, "expected 8 bytes, found 7"),
        (replace(GOOD, integrity=NEWER), EXPECTED, False, False, "format 2"),
        (
            replace(GOOD, integrity=TORN, world_size=None, model_hash=None),
            EXPECTED,
            False,
            True,
            "integrity",
        ),
        (GOOD, replace(EXPECTED, world_size=4), False, False, "world size: expected 4, found 2"),
        (GOOD, replace(EXPECTED, world_size=4, check_world_size=False), True, False, "world size"),
        (
            GOOD,
            replace(EXPECTED, world_size=4, elastic=True),
            True,
            False,
            "world size 2 ranks in the checkpoint, 4 now: resharded",
        ),
        (GOOD, replace(EXPECTED, elastic=True), True, False, "world size 2, "),
        (
            GOOD,
            replace(EXPECTED, model_hash=RENAMED.hash, model=RENAMED, rename={"w": "v"}),
            True,
            False,
            "accepted",
        ),
        (
            GOOD,
            replace(EXPECTED, model_hash=OTHER.hash, model=OTHER, rename={"w": "v"}),
            False,
            False,
            "only in the checkpoint: model.v [128, 64] float32",
        ),
        (
            GOOD,
            replace(EXPECTED, model_hash=OTHER.hash, model=OTHER),
            False,
            False,
            "w: [128, 64] float32 in the checkpoint, [128, 32] float32 in this model",
        ),
        (GOOD, replace(EXPECTED, model_hash="x", check_model=False), True, False, "model hash"),
        (GOOD, replace(EXPECTED, model_hash=None, model=None), True, False, "model hash"),
        (replace(GOOD, model_hash=None), EXPECTED, False, False, "found none"),
        (
            replace(GOOD, model_hash="pipeline"),
            EXPECTED,
            False,
            False,
            "another rank's model differs",
        ),
        (
            GOOD,
            replace(EXPECTED, refused={GOOD.id: "rank 1: bad chunk"}),
            False,
            True,
            "rank 1: bad chunk",
        ),
    ],
)
def test_a_verdict_says_what_was_expected_and_found(
    facts: Candidate, expectation: Expectation, accepted: bool, corrupt: bool, says: str
) -> None:
    verdict = judge(facts, expectation)
    assert (verdict.accepted, verdict.corrupt) == (accepted, corrupt)
    assert says in verdict.reason
    assert json.loads(json.dumps(verdict.to_json()))["reason"] == verdict.reason


def test_the_newest_acceptable_one_is_taken_and_older_ones_are_not_even_looked_at() -> None:
    def candidates() -> Iterator[Candidate]:
        yield replace(GOOD, id="broken", integrity=TORN)
        yield replace(GOOD, id="other", world_size=3)
        yield GOOD
        raise AssertionError("looked at an older one")

    choice = choose(candidates(), EXPECTED)
    assert choice.accepted == GOOD
    assert [verdict.id for verdict in choice.verdicts] == ["broken", "other", GOOD.id]


def test_every_candidate_is_judged_when_asked_and_the_newest_still_wins() -> None:
    choice = choose([GOOD, replace(GOOD, id="older")], EXPECTED, every=True)
    assert choice.accepted == GOOD
    assert len(choice.verdicts) == 2


def test_nothing_is_chosen_when_none_is_acceptable() -> None:
    assert choose([replace(GOOD, integrity=TORN)], EXPECTED).accepted is None
    assert choose([], EXPECTED).verdicts == ()


def verdicts(accepted: dict[int, bool], digest: str = "d") -> list[Verdict]:
    """Of checkpoints by step, newest first."""
    return [
        Verdict(f"step-{step:010d}.a0", step, "", ok, (), digest=f"{digest}{step}")
        for step, ok in sorted(accepted.items(), reverse=True)
    ]


@pytest.mark.parametrize(
    ("nodes", "step"),
    [
        ([{30: True}], 30),
        ([{30: False, 20: True, 10: True}], 20),
        ([{30: False}], None),
        ([{}], None),
        ([{30: True, 20: True}, {30: True, 20: True}], 30),
        ([{30: True, 20: True}, {30: False, 20: True}], 20),
        ([{30: True, 20: True}, {20: True}], 20),
        ([{20: True}, {30: True, 20: True}, {30: True, 20: True}], 20),
        ([{30: True, 20: False}, {30: False, 20: True}], None),
        ([{30: True}, {}], None),
    ],
)
def test_nodes_agree_on_the_newest_that_all_of_them_accept(
    nodes: list[dict[int, bool]], step: int | None
) -> None:
    found = agree({f"node {n}": verdicts(each) for n, each in enumerate(nodes)})
    assert (found.step if found else None) == step


def test_no_nodes_agree_on_nothing() -> None:
    assert agree({}) is None


def test_nodes_do_not_agree_on_other_bytes_under_the_same_name() -> None:
    here, there = verdicts({30: True, 20: True}), verdicts({30: True}, "other")
    there += verdicts({20: True})
    found = agree({"here": here, "there": there})
    assert found is not None
    assert found.step == 20


NODES = st.lists(st.dictionaries(st.integers(0, 5), st.booleans()), min_size=1, max_size=4)


@given(nodes=NODES, order=st.randoms(use_true_random=False))
def test_what_nodes_agree_on_is_accepted_by_all_and_nothing_newer_is(
    nodes: list[dict[int, bool]], order: random.Random
) -> None:
    common = [step for step in range(6) if all(node.get(step) for node in nodes)]
    order.shuffle(nodes)
    found = agree({str(n): verdicts(each) for n, each in enumerate(nodes)})
    assert (found.step if found else None) == max(common, default=None)


@given(st.lists(st.sampled_from([None, TORN, NEWER])))
def test_one_node_takes_what_it_has_chosen(problems: list[Integrity | None]) -> None:
    facts = [
        replace(GOOD, id=f"step-{step:010d}.a0", step=step, integrity=problem or GOOD.integrity)
        for step, problem in enumerate(problems)
    ]
    choice = choose(reversed(facts), EXPECTED)
    agreed = agree({"here": choice.verdicts})
    assert (agreed.id if agreed else None) == (choice.accepted.id if choice.accepted else None)


MANIFEST = Manifest(GOOD.id, 30, None, 1.0, 2, {}, MODEL.hash, {}, (), rng=True, data=True)


@pytest.mark.parametrize(
    ("expectation", "fits"),
    [
        (EXPECTED, True),
        (Expectation(2), True),
        (Expectation(3), False),
        (Expectation(3, elastic=True), True),
        (Expectation(3, check_world_size=False), True),
        (Expectation(2, OTHER.hash), False),
        (Expectation(2, OTHER.hash, check_model=False), True),
        (Expectation(2, OTHER.hash, rename={"w": "v"}), True),
        (Expectation(3, OTHER.hash, rename={"w": "v"}), False),
    ],
)
def test_what_cannot_fit_the_run_is_not_committed(expectation: Expectation, fits: bool) -> None:
    assert could_fit(MANIFEST, expectation) is fits


def test_without_a_manifest_nothing_fits() -> None:
    assert not could_fit(None, EXPECTED)
