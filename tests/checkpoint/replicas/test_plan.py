from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.replicas.plan import (
    FIRST_RETRY,
    LAST_RETRY,
    CommittedFiles,
    by_checkpoint,
    by_run,
    closure,
    counts,
    deletions,
    is_complete,
    missing,
    newest_counting,
    retry_in,
    uploads,
)

MANIFEST = "manifest.json"
FILES = {"rank-00000.pack": 7, "rank-00000.json": 5, MANIFEST: 3}


def id_of(step: int, attempt: int = 0) -> str:
    return f"step-{step:010d}.a{attempt}"


def here_of(**needs: list[int]) -> dict[str, CommittedFiles]:
    """`here_of(s20=[10])`: the checkpoint of step 20 needs that of step 10."""
    return {
        id_of(int(name[1:])): CommittedFiles(FILES, tuple(map(id_of, steps)))
        for name, steps in needs.items()
    }


def there_of(*steps: int, without: str = "") -> dict[str, dict[str, int]]:
    files = {name: size for name, size in FILES.items() if name != without}
    return {id_of(step): dict(files) for step in steps}


def test_names_are_sorted_by_run_and_checkpoint_and_strangers_are_left_alone() -> None:
    names = {f"{id_of(1)}/a": 1, f"{id_of(1)}/b": 2, "README": 3, "quarantine/x/y": 4, id_of(2): 5}
    assert by_checkpoint(names) == {id_of(1): {"a": 1, "b": 2}}
    assert by_run({f"run/{id_of(1)}/a": 1, "other/file": 2, "file": 3}) == {
        "run": {id_of(1): {"a": 1}}
    }


def test_what_a_checkpoint_needs_is_sent_first_and_manifests_come_last() -> None:
    here = here_of(s30=[20], s20=[10], s10=[])
    assert closure(id_of(30), here) == [id_of(10), id_of(20), id_of(30)]
    order = ["rank-00000.pack", "rank-00000.json", MANIFEST]
    assert uploads(id_of(30), here, {}) == [
        (id_of(step), file) for step in (10, 20, 30) for file in order
    ]


def test_only_what_is_missing_or_has_another_size_is_sent() -> None:
    here = here_of(s20=[10], s10=[])
    there = there_of(10) | {id_of(20): {"rank-00000.pack": 6, "rank-00000.json": 5}}
    assert uploads(id_of(20), here, there) == [
        (id_of(20), "rank-00000.pack"),
        (id_of(20), MANIFEST),
    ]
    assert uploads(id_of(10), here, there) == []


def test_a_checkpoint_is_complete_only_with_everything_it_needs() -> None:
    here = here_of(s30=[20], s20=[10], s10=[])
    assert is_complete(id_of(30), here, there_of(10, 20, 30))
    for step in (10, 20, 30):
        for file in FILES:
            there = there_of(10, 20, 30) | there_of(step, without=file)
            assert not is_complete(id_of(30), here, there)


def test_the_newest_is_copied_first_after_an_outage() -> None:
    here = here_of(s10=[], s20=[], s30=[], s40=[])
    assert missing(here, there_of(20)) == [id_of(40), id_of(30), id_of(10)]


@pytest.mark.parametrize(
    ("present", "there", "expected"),
    [
        ([30], [10, 20, 30], [20, 10]),
        ([20, 30], [10, 20, 30], [10]),
        ([30], [10, 20], []),  # nothing newer is complete there
        ([], [10, 20, 30], []),  # lost here, not deleted
        ([20], [10, 20, 30], []),  # the newest is lost here, and may need the oldest
        ([30], [30], []),
    ],
)
def test_what_was_deleted_here_goes_there_once_something_newer_is_complete(
    present: list[int], there: list[int], expected: list[int]
) -> None:
    here = here_of(**{f"s{step}": [] for step in present})
    found = deletions(list(here), here, there_of(*there))
    assert found == [id_of(step) for step in expected]


def test_what_others_have_put_into_a_replica_stays_there() -> None:
    here = here_of(s30=[])
    there = there_of(10, 20, 30) | {id_of(5): {"model.pt": 5}}
    there[id_of(10)] = {**there[id_of(10)], "notes/plan.txt": 5}
    assert deletions(list(here), here, there) == [id_of(20)]


def test_what_is_damaged_or_needed_here_stays_there() -> None:
    here = here_of(s30=[10], s40=[])
    there = there_of(5, 10, 20, 30, 40)
    assert deletions([*here, id_of(20)], here, there) == [id_of(5)]


def test_an_incomplete_copy_of_what_is_gone_here_is_removed() -> None:
    here = here_of(s30=[])
    assert deletions([id_of(30)], here, there_of(20, without=MANIFEST) | there_of(30)) == [
        id_of(20)
    ]
    half = there_of(40, without=MANIFEST)
    assert deletions([id_of(30)], here, half | there_of(10, 30)) == [id_of(10)]


@given(
    st.lists(st.integers(1, 12), unique=True),
    st.lists(st.integers(1, 12), unique=True),
    st.data(),
)
def test_deletions_never_touch_what_is_here_or_the_newest_complete_one(
    local: list[int], remote: list[int], data: st.DataObject
) -> None:
    needs = {
        step: data.draw(st.lists(st.sampled_from(local), max_size=2).map(set)) for step in local
    }
    here = {
        id_of(step): CommittedFiles(FILES, tuple(id_of(n) for n in needs[step] if n < step))
        for step in local
    }
    lacking = data.draw(st.sets(st.sampled_from(remote))) if remote else set()
    there = there_of(*remote) | there_of(*lacking, without=MANIFEST)
    whole = [step for step in remote if step not in lacking]
    gone = deletions(list(here), here, there)
    assert not set(gone) & set(here)
    assert len(gone) == len(set(gone))
    if gone:
        assert id_of(max(whole)) not in gone
        newest_on_both = max(s for s in local if is_complete(id_of(s), here, there))
        assert all(id < id_of(newest_on_both) for id in gone)


@given(st.lists(st.integers(1, 9), unique=True), st.lists(st.integers(1, 9), unique=True))
def test_sending_what_is_missing_makes_everything_complete(
    local: list[int], remote: list[int]
) -> None:
    here = {
        id_of(s): CommittedFiles(FILES, tuple(id_of(n) for n in local if n in (s - 1, s - 2)))
        for s in local
    }
    there = there_of(*remote, without="rank-00000.json")
    for id in missing(here, there):
        for each, file in uploads(id, here, there):
            if file == MANIFEST:
                others = here[each].files.keys() - {MANIFEST}
                assert others <= there[each].keys()
            there.setdefault(each, {})[file] = here[each].files[file]
        assert is_complete(id, here, there)
    assert missing(here, there) == []


X, Y = id_of(10), id_of(20)


@pytest.mark.parametrize(
    ("policy", "complete", "expected"),
    [
        ("local", {"a": []}, True),
        ("quorum", {}, True),
        ("quorum", {"a": []}, False),  # one of two is not more than half
        ("quorum", {"a": [X]}, True),
        ("quorum", {"a": [X], "b": []}, True),
        ("quorum", {"a": [Y], "b": []}, False),
        ("quorum", {"a": [X], "b": [], "c": []}, False),
        ("quorum", {"a": [X], "b": [X], "c": []}, True),
        ("all", {}, True),
        ("all", {"a": [X], "b": [X]}, True),
        ("all", {"a": [X], "b": [Y]}, False),
    ],
)
def test_a_policy_says_how_many_copies_make_a_checkpoint_count(
    policy: str, complete: dict[str, list[str]], expected: bool
) -> None:
    assert counts(X, policy, complete) is expected


def test_the_newest_that_counts_is_what_retention_must_keep() -> None:
    ids = [id_of(10), id_of(30), id_of(20)]
    assert newest_counting(ids, "local", {"a": []}) == id_of(30)
    assert newest_counting(ids, "all", {"a": [id_of(10), id_of(20)]}) == id_of(20)
    assert newest_counting(ids, "all", {"a": []}) is None


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_retries_wait_longer_and_longer_up_to_a_bound(failures: int, random: float) -> None:
    assert FIRST_RETRY / 2 <= retry_in(failures, random) <= LAST_RETRY
    assert retry_in(failures, random) <= retry_in(failures + 1, random)
