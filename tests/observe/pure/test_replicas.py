from __future__ import annotations

from typing import Any

from autoglm_resume.observe.pure import replicas
from autoglm_resume.observe.pure.replicas import Replica
from tests.observe.runs import WALL, Script

HERE = "/nfs/copies"


def id_of(step: int, token: str = "a0") -> str:
    return f"step-{step:010d}.{token}"


def saved(*steps: int) -> Script:
    script = Script().life().attempt(0)
    for step in steps:
        script.save(0, step)
    return script


def copied(script: Script, *ids: str) -> Script:
    for id in ids:
        script.say("replicated", id=id, replica=HERE, seconds=0.1, bytes=10)
    return script


def only(script: Script) -> Replica:
    (found,) = replicas.of(script.events, [HERE])
    return found


def test_where_nothing_was_copied_everything_is_behind() -> None:
    assert only(saved(10, 20)) == Replica(HERE, None, 2, "", None)
    assert only(saved()) == Replica(HERE, None, 0, "", None)


def test_what_is_newer_than_the_newest_copy_is_behind() -> None:
    found = only(copied(saved(10, 20, 30), id_of(20)))
    assert (found.newest, found.behind) == (id_of(20), 1)


def test_what_was_retired_here_is_behind_nowhere() -> None:
    script = copied(saved(10, 20, 30), id_of(10))
    for step in (10, 20):
        script.say("pruned", id=id_of(step))
    assert (only(script).newest, only(script).behind) == (id_of(10), 1)


def test_trouble_is_shown_until_it_is_over() -> None:
    trouble: dict[str, Any] = {"replica": HERE, "behind": 1, "reason": "no such bucket"}
    script = saved(10).at(50).say("replica_behind", **trouble)
    assert (only(script).error, only(script).since) == ("no such bucket", WALL + 50)
    script.say("replica_caught_up", replica=HERE, seconds=3.0)
    assert (only(script).error, only(script).since) == ("", None)


def test_copies_of_a_branch_that_was_given_up_are_not_the_newest() -> None:
    script = copied(saved(10, 20), id_of(10), id_of(20))
    script.say("branched", step=10, attempt=1).save(1, 15)
    assert (only(script).newest, only(script).behind) == (id_of(10), 1)
