from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.errors import UsageError
from autoglm_resume.supervise.core.drill import KINDS, Drill, moments, parse


@pytest.mark.parametrize(
    ("spec", "drill"),
    [
        ("kill", Drill("kill", "kill")),
        ("kill:rank=1,step=30", Drill("kill:rank=1,step=30", "kill", rank=1, step=30)),
        ("stop:step=30", Drill("stop:step=30", "stop", step=30)),
        ("exit:code=3,step=30", Drill("exit:code=3,step=30", "exit", step=30, code=3)),
        ("exit", Drill("exit", "exit", code=1)),
        ("corrupt:latest", Drill("corrupt:latest", "corrupt")),
        ("corrupt:latest,step=9", Drill("corrupt:latest,step=9", "corrupt", step=9)),
        ("random", Drill("random", "random", seed=0, every=30.0)),
        (
            "random:seed=7,every=20s,count=5",
            Drill("random:seed=7,every=20s,count=5", "random", seed=7, every=20.0, count=5),
        ),
        ("random:every=1m", Drill("random:every=1m", "random", every=60.0)),
        ("random:count=0", Drill("random:count=0", "random", count=0)),
    ],
)
def test_a_drill_is_read(spec: str, drill: Drill) -> None:
    assert parse([spec], world_size=2) == (drill,)


def test_several_drills_keep_their_order_and_none_is_no_drill() -> None:
    assert [d.kind for d in parse(["stop", "none", "kill"], 1)] == ["stop", "kill"]
    assert parse(["none"], 1) == ()
    assert parse([], 1) == ()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "expected one of kill, stop, exit, corrupt, random, none, found ''"),
        ("boom:rank=1", "found 'boom'"),
        ("KILL", "found 'KILL'"),
        ("kill:rank", "kill takes rank, step; found 'rank'"),
        ("kill:code=3", "kill takes rank, step; found 'code=3'"),
        ("kill:latest", "found 'latest'"),
        ("random:rank=1", "random takes count, every, seed; found 'rank=1'"),
        ("none:rank=1", "none takes nothing; found 'rank=1'"),
        ("kill:rank=-1", "rank: expected a whole number, found '-1'"),
        ("kill:rank=one", "rank: expected a whole number, found 'one'"),
        ("kill:step=", "step: expected a whole number, found ''"),
        ("kill:step=1.5", "step: expected a whole number, found '1.5'"),
        ("kill:rank=2", "rank 2 does not exist: the world size is 2"),
        ("exit:code=256", "expected an exit code from 1 to 255, found 256"),
        ("random:every=soon", "every: expected a duration such as 20s, found 'soon'"),
        ("random:every=0s", "every: expected a duration such as 20s, found '0s'"),
        ("random:every=-5s", "every: expected a duration such as 20s, found '-5s'"),
    ],
)
def test_a_bad_drill_is_named_with_what_is_allowed(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(["kill", spec], world_size=2)
    assert says in caught.value.message
    assert caught.value.message.startswith(f"--drill {spec}: ")
    assert "--drill kill:rank=1,step=30" in caught.value.hint


def test_an_exit_code_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="from 1 to 255, found 0"):
        parse(["exit:code=0"], world_size=2)


@given(
    st.text(max_size=20) | st.sampled_from(KINDS).flatmap(lambda k: st.text().map(f"{k}:".__add__))
)
def test_any_text_is_a_drill_or_a_usage_error(spec: str) -> None:
    try:
        drills = parse([spec], world_size=3)
    except UsageError:
        return
    for drill in drills:
        assert drill.kind in KINDS
        assert drill.rank is None or 0 <= drill.rank < 3


@given(st.integers(0, 2**64), st.integers(1, 16), st.integers(0, 50))
def test_the_seed_decides_every_moment_and_rank(seed: int, world: int, count: int) -> None:
    drill = Drill("", "random", seed=seed, every=20.0, count=count)
    plan = moments(drill, world)
    assert plan == moments(drill, world)
    assert len(plan) == count
    assert all(wait >= 0 and 0 <= rank < world for wait, rank in plan)


def test_other_seeds_make_other_moments_and_the_mean_is_as_asked() -> None:
    one, other = (moments(Drill("", "random", seed=s, every=20.0), 4) for s in (1, 2))
    assert one != other
    assert 18 < sum(wait for wait, _ in one) / len(one) < 22
    assert {rank for _, rank in one} == {0, 1, 2, 3}
