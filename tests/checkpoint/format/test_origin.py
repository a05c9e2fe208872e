from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.format.document import JsonNode
from autoglm_resume.checkpoint.format.origin import Origin, differences, edited


def of(*args: str, script: str = "/a/train.py", content: str = "one") -> Origin:
    return Origin("run", script, content, args)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["--lr", "0.1"], ["--lr=0.1"]),
        (["--lr", "0.1"], ["--lr", ".1"]),
        (["--lr", "1e-3"], ["--lr", "0.001"]),
        (["--lr", "0.1", "--amp"], ["--amp", "--lr", "0.1"]),
        (["lr=0.1", "bs=2"], ["bs=2", "lr=0.1"]),
        (["data"], ["--resume", "data"][1:]),
        ([], ["--resume"]),
        ([], ["--resume", "auto"]),
        (["--local-rank=0"], ["--local_rank=1"]),
    ],
)
def test_what_is_the_same_run(then: list[str], now: list[str]) -> None:
    assert differences(of(*then), of(*now)) == []
    assert differences(of(*now), of(*then)) == []


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (["--lr", "0.1"], ["--lr", "0.01"], "--lr: 0.1 then, 0.01 now"),
        (["--lr", "0.1"], [], "--lr: 0.1 then, not given now"),
        ([], ["--amp"], "--amp: not given then, given now"),
        (["lr=0.1"], ["lr=1"], "lr: 0.1 then, 1 now"),
        (["a"], ["b"], "argument 1: a then, b now"),
        (["--seed", "-1"], ["--seed", "1"], "--seed: -1 then, 1 now"),
        (["--max-tokens", "512"], ["--max-tokens", "1024"], "--max-tokens: 512 then, 1024 now"),
        (["--eos-token", "a"], ["--eos-token", "b"], "--eos-token: a then, b now"),
        (["--resume", "x.pt"], ["--resume", "y.pt"], "--resume: x.pt then, y.pt now"),
        (["--data", "a", "--data", "b"], ["--data", "b"], "--data: a b then, b now"),
    ],
)
def test_what_is_another_run(then: list[str], now: list[str], said: str) -> None:
    assert differences(of(*then), of(*now)) == [said]


def test_a_script_that_was_moved_or_edited_is_the_same_but_not_both_at_once() -> None:
    here = of()
    assert differences(here, of(script="/b/train.py")) == []
    assert differences(here, of(content="two")) == []
    assert edited(here, of(content="two"))
    assert not edited(here, of(script="/b/train.py"))
    both = of(script="/b/train.py", content="two")
    assert differences(here, both) == ["script: /a/train.py then, /b/train.py now"]


def test_a_script_that_is_still_where_it_was_has_not_been_moved() -> None:
    copy = of(script="/b/train.py")
    assert differences(of(), copy, remains=True) == ["script: /a/train.py then, /b/train.py now"]
    assert differences(of(), of(), remains=True) == []
    assert differences(of(), Origin("run"), remains=True) == []


def test_of_what_nobody_knows_nothing_is_said() -> None:
    assert differences(Origin("run"), of("--lr", "1")) == []
    assert differences(of("--lr", "1"), Origin("run")) == []


@given(st.lists(st.text()))
def test_any_arguments_come_back_and_are_their_own_equal(args: list[str]) -> None:
    origin = of(*args)
    assert Origin.from_node(JsonNode(origin.to_json(), "file")) == origin
    assert differences(origin, origin) == []
