"""A process that dies between any two file operations leaves a checkpoint to continue from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import files
from autoglm_resume.checkpoint import saver
from autoglm_resume.checkpoint.gate import Expectation, choose
from autoglm_resume.checkpoint.snapshot import Snapshot
from autoglm_resume.checkpoint.store import Store

OLDEST, OLD, NEW = (f"step-000000000{step}.a0" for step in (0, 1, 2))
OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.scandir"}
SURVIVED, CRASHED, FAILED = 0, 9, 1


def in_a_process_that_dies(at: int, root: Path, work: Callable[[], object]) -> int:
    """Run `work` in a fork that dies right before its file operation number `at` in `root`."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS and str(arguments[0]).startswith(str(root)):
                seen += 1
                if seen == at:
                    os._exit(CRASHED)

        code = FAILED
        try:
            sys.addaudithook(count)
            work()
            code = SURVIVED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_both(store: Store, taken: list[Snapshot]) -> None:
    for each in taken:
        saver.persist(each, store)


STORIES: dict[str, Callable[[Store], object]] = {
    "save": lambda store: None,
    "save and delete the old ones": lambda store: [store.delete(id) for id in (OLDEST, OLD)],
    "save and quarantine the new one": lambda store: store.quarantine(NEW, "a drill"),
    "save and sweep": lambda store: store.sweep(),
}


@pytest.mark.parametrize("story", STORIES)
def test_dying_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, snaps: Callable[..., list[Snapshot]], save: Any, story: str
) -> None:
    taken = snaps(2, lineage=[OLD, OLDEST], width=8)
    outcomes = set()
    for at in range(1, 200):
        store = Store(tmp_path / str(at))
        save(store, 0, width=8)
        save(store, 1, width=8, lineage=[OLDEST])

        def work(store: Store = store) -> None:
            save_both(store, taken)
            STORIES[story](store)

        code = in_a_process_that_dies(at, store.root, work)
        assert code in (SURVIVED, CRASHED)
        chosen = choose(store.candidates(deep=True), Expectation(2)).accepted
        assert chosen is not None

        store.complete()
        recovered = choose(store.candidates(deep=True), Expectation(2)).accepted
        assert recovered is not None
        assert recovered.step >= chosen.step
        store.sweep()
        assert choose(store.candidates(deep=True), Expectation(2)).accepted == recovered
        assert all(facts.integrity.ok for facts in store.candidates())
        assert store.uncommitted() == []
        assert not list(store.root.glob(f"step-*/{files.TEMPORARY}*"))
        outcomes.add(recovered.id)
        if code == SURVIVED:
            break
    assert code == SURVIVED
    assert at > 15
    assert outcomes == {OLD, NEW}
