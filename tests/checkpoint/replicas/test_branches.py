"""What a replica knows of branches: nothing that was given up comes back from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import Branch, checkpoint_id
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.replicas.mirror import committed, replicate, tell_branches
from autoglm_resume.checkpoint.replicas.plan import (
    CommittedFiles,
    branch_file,
    branches_in,
    by_checkpoint,
    by_run,
    deletions,
    in_line,
)
from autoglm_resume.checkpoint.replicas.repair import restore_missing
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.storage.storage import open_storage
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError

RUN = "run1"
BACK = Branch(400, 2)
FILES = {MANIFEST: 1}


class Machine:
    """A directory of checkpoints, and what brings a replica up to date with it."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(directory)
        self._writer = PartWriter(self.store, share=False)

    def save(self, step: int, token: str) -> str:
        state = {"o": {"t": torch.full((9,), float(step))}}
        taken = capture.take(state, id=checkpoint_id(step, token), rank=0, world_size=1)
        self._writer.persist(taken)
        return taken.id

    def mirror(self, target: Path, *branches: Branch) -> None:
        target.mkdir(exist_ok=True)
        storage = open_storage(str(target), RUN)
        names = storage.names()
        tell_branches(branches, names, storage)
        there, here = by_checkpoint(names), committed(self.store, {})
        for id in here:
            replicate(self.store, id, here, there, storage)
        for id in deletions(list(here), here, there, branches):
            storage.remove(id)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    found = Machine(tmp_path / "checkpoints")
    found.save(400, "a1")
    found.save(600, "a1")
    return found


def restored(tmp_path: Path, *targets: Path, branches: tuple[Branch, ...] = ()) -> str:
    found = restore_missing(Store(tmp_path / "new"), [*map(str, targets)], None, branches)
    assert found is not None
    assert found.attempts >= 2
    return found.id


def test_what_was_given_up_is_not_restored_though_it_is_the_newest(
    machine: Machine, tmp_path: Path
) -> None:
    machine.mirror(tmp_path / "copies")
    machine.mirror(tmp_path / "copies", BACK)  # the machine is lost before it saves anything
    found = restore_missing(Store(tmp_path / "new"), [str(tmp_path / "copies")])
    assert found is not None
    assert (found.id, found.attempts) == (checkpoint_id(400, "a1"), 2)


def test_the_last_attempt_tells_where_nobody_told_of_a_branch(
    machine: Machine, tmp_path: Path
) -> None:
    machine.mirror(tmp_path / "copies")
    newest = machine.save(410, "a2")
    machine.mirror(tmp_path / "copies")
    assert restored(tmp_path, tmp_path / "copies") == newest


def test_a_replica_that_lags_does_not_bring_back_what_another_knows_was_given_up(
    machine: Machine, tmp_path: Path
) -> None:
    machine.mirror(tmp_path / "late")
    machine.mirror(tmp_path / "copies", BACK)
    assert restored(tmp_path, tmp_path / "late", tmp_path / "copies") == checkpoint_id(400, "a1")


def test_what_only_the_journal_knows_counts_too(machine: Machine, tmp_path: Path) -> None:
    machine.mirror(tmp_path / "late")
    assert restored(tmp_path, tmp_path / "late", branches=(BACK,)) == checkpoint_id(400, "a1")
    only = (Branch(300, 2),)
    with pytest.raises(CheckpointError, match="only those of branches that were given up"):
        restore_missing(Store(tmp_path / "none"), [str(tmp_path / "late")], None, only)


def test_what_was_retired_here_goes_there_though_it_was_newer(
    machine: Machine, tmp_path: Path
) -> None:
    machine.mirror(tmp_path / "copies")
    machine.store.delete(checkpoint_id(600, "a1"))
    newest = machine.save(410, "a2")
    machine.mirror(tmp_path / "copies", BACK)
    names = open_storage(str(tmp_path / "copies"), RUN).names()
    assert set(by_checkpoint(names)) == {checkpoint_id(400, "a1"), newest}
    assert branches_in(names) == {BACK}


def test_branches_are_no_checkpoints_for_whoever_does_not_know_them() -> None:
    name = branch_file(BACK)
    assert name == "branches/step-0000000400.a2"
    assert by_checkpoint({name: 1}) == {}
    assert by_run({f"{RUN}/{name}": 1}) == {}
    assert branches_in(["step-0000000400.a2/manifest.json", "branches/x", name]) == {BACK}


def test_the_newest_is_that_of_the_last_attempt() -> None:
    ids = [checkpoint_id(s, t) for s, t in ((400, "a1"), (600, "a1"), (410, "a2"), (405, "a2x1"))]
    assert in_line(ids, ()) == [ids[2], ids[3], ids[1], ids[0]]
    assert in_line(ids, [BACK]) == [ids[2], ids[3], ids[0]]


def test_something_newer_that_is_gone_here_still_keeps_all_if_it_was_not_given_up() -> None:
    old, lost, here = (checkpoint_id(s, t) for s, t in ((10, "a0"), (30, "a0"), (20, "a1")))
    there = dict.fromkeys((old, lost, here), FILES)
    mine = {here: CommittedFiles(FILES)}
    assert deletions([here], mine, there) == []
    assert deletions([here], mine, there, [Branch(10, 1)]) == [lost, old]
