from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import files
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Parent
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.store.commit import commit, complete, sweep
from autoglm_resume.checkpoint.store.examine import candidates, examine
from autoglm_resume.checkpoint.store.gate import Expectation, choose
from autoglm_resume.checkpoint.store.store import Store, is_grave
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CorruptCheckpoint

Snaps = Callable[..., list[Snapshot]]
STEP_1, STEP_2, STEP_3 = (f"step-000000000{step}.a0" for step in (1, 2, 3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt")


def damage(file: Path, place: int = 20) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_store_that_is_not_there_is_empty(store: Store) -> None:
    assert store.committed() == store.uncommitted() == store.quarantined() == []
    assert store.latest() is None
    assert list(candidates(store)) == complete(store) == sweep(store) == []
    assert not store.root.exists()


def test_only_a_manifest_makes_a_checkpoint(store: Store, snaps: Snaps, save: Any) -> None:
    save(store, 1)
    PartWriter(store, share=False).persist(snaps(2)[1])
    (store.root / "notes").mkdir()
    assert [p.name for p in store.committed()] == [STEP_1]
    assert [p.name for p in store.uncommitted()] == [STEP_2]
    assert commit(store, STEP_2) is None


def test_the_newest_has_the_highest_step_then_the_highest_attempt(store: Store, save: Any) -> None:
    for step, token in ((2, "a9"), (2, "a10"), (10, "a0"), (3, "f00")):
        save(store, step, token=token)
    order = ["step-0000000010.a0", "step-0000000003.f00", "step-0000000002.a10"]
    assert [p.name for p in store.committed()][:3] == order
    assert [f.id for f in candidates(store)][:3] == order


def test_each_checkpoint_names_the_one_before(store: Store, save: Any) -> None:
    save(store, 1)
    save(store, 2, lineage=[STEP_1])
    first, second = (store.load_manifest(store.directory(id)) for id in (STEP_1, STEP_2))
    assert first.parent is None
    assert second.parent == Parent(STEP_1, first.digest)


def test_a_parent_that_was_never_finished_or_is_gone_is_skipped(
    store: Store, snaps: Snaps, save: Any
) -> None:
    save(store, 1)
    PartWriter(store, share=False).persist(snaps(2, lineage=[STEP_1])[0])
    save(store, 3, lineage=[STEP_2, STEP_1])
    manifest = store.load_manifest(store.directory(STEP_3))
    assert manifest.parent is not None
    assert manifest.parent.id == STEP_1
    assert [p.name for p in store.uncommitted()] == [STEP_2]


def test_a_commit_first_commits_what_only_lacks_its_manifest(store: Store, save: Any) -> None:
    save(store, 1)
    save(store, 2, lineage=[STEP_1])
    for id in (STEP_1, STEP_2):
        (store.directory(id) / MANIFEST).unlink()
    save(store, 3, lineage=[STEP_2, STEP_1])
    chain = [store.load_manifest(path).parent for path in store.committed()]
    assert [parent and parent.id for parent in chain] == [STEP_2, STEP_1, None]
    assert all(facts.integrity.ok for facts in candidates(store))


def test_any_order_of_the_ranks_gives_the_same_manifest(tmp_path: Path, snaps: Snaps) -> None:
    made = set()
    for number, order in enumerate(itertools.permutations(range(3))):
        store = Store(tmp_path / str(number))
        taken = snaps(1, ranks=3, width=4)
        for rank in order:
            assert commit(store, STEP_1) is None
            PartWriter(store, share=False).persist(taken[rank])
        manifest = commit(store, STEP_1)
        assert manifest is not None
        assert manifest == store.load_manifest(store.directory(STEP_1))
        made.add(tuple(tuple(part.objects.items()) for part in manifest.parts))
    assert len(made) == 1


def test_committing_twice_gives_the_same_bytes(store: Store, save: Any) -> None:
    save(store, 1)
    save(store, 2, lineage=[STEP_1])
    file = store.directory(STEP_2) / MANIFEST
    before = file.read_bytes()
    file.unlink()
    assert [m.id for m in complete(store)] == [STEP_2]
    assert file.read_bytes() == before


def test_parts_that_cannot_belong_together_are_not_committed(
    store: Store, snaps: Snaps, tmp_path: Path
) -> None:
    def parts(root: str, **options: Any) -> Path:
        other = Store(tmp_path / root)
        for taken in snaps(1, width=4, **options):
            PartWriter(other, share=False).persist(taken)
        return other.directory(STEP_1)

    two, three = parts("two"), parts("three", ranks=3)
    other = parts("other", lineage=["step-0000000000.a0"])
    target = store.directory(STEP_1)

    def mixed(source: Path) -> None:
        shutil.copytree(two, target)
        (target / MANIFEST).unlink()
        for file in source.glob("rank-00001.*"):
            shutil.copy2(file, target)

    mixed(three)
    with pytest.raises(CorruptCheckpoint):
        commit(store, STEP_1)
    assert complete(store) == []
    shutil.rmtree(target)
    # A rank that missed an announced save names other ancestors, and fits all the same.
    mixed(other)
    manifest = commit(store, STEP_1)
    assert manifest is not None
    assert manifest.parent is None


@pytest.mark.parametrize("name", ["rank-00000.json", "rank-00000.pack"])
def test_a_damaged_part_is_never_committed(store: Store, save: Any, name: str) -> None:
    save(store, 1)
    (store.directory(STEP_1) / MANIFEST).unlink()
    file = store.directory(STEP_1) / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpoint, match=name):
        commit(store, STEP_1)
    assert complete(store) == []
    assert store.latest() is None


def test_an_untouched_pack_is_trusted_and_a_copied_one_is_read(store: Store, save: Any) -> None:
    save(store, 1)
    path = store.directory(STEP_1)
    assert examine(store, path).integrity.how == "fingerprint"
    done: list[int] = []
    deep = examine(store, path, deep=True, progress=done.append)
    assert (deep.integrity.ok, deep.integrity.how, sum(done)) == (True, "content", deep.stored)
    copy = store.root / "copy" / STEP_1
    shutil.copytree(path, copy)
    assert examine(store, copy).integrity.how == "content"
    assert examine(store, copy).integrity.ok
    damage(copy / "rank-00001.pack")
    problem = examine(store, copy).integrity.problem
    # Two threads read: either comes to it first, or to the cast that is made of it.
    assert re.search(r"rank-00001\.pack: chunk \d: expected blake3:.* at offset 0\)", problem)


def test_facts_tell_the_gate_everything(store: Store, save: Any) -> None:
    save(store, 1)
    (facts,) = candidates(store)
    assert (facts.id, facts.step, facts.world_size, facts.created) == (STEP_1, 1, 2, 1_700_000_001)
    assert facts.model is not None
    assert facts.model_hash == facts.model.hash
    assert facts.manifest is not None
    assert facts.raw == facts.manifest.raw > facts.stored > 0
    expectation = Expectation(2, facts.model_hash, facts.model)
    assert choose(candidates(store), expectation).accepted == facts


def test_a_torn_manifest_is_latest_but_never_accepted(store: Store, save: Any) -> None:
    save(store, 1)
    save(store, 2)
    file = store.directory(STEP_2) / MANIFEST
    file.write_bytes(file.read_bytes()[:100])
    assert store.latest() == store.directory(STEP_2)
    choice = choose(candidates(store), Expectation(2))
    assert choice.accepted is not None
    assert choice.accepted.id == STEP_1
    assert choice.verdicts[0].corrupt
    assert "manifest.json: expected a JSON document" in choice.verdicts[0].reason


def test_a_newer_format_is_refused_but_not_called_corrupt(store: Store, save: Any) -> None:
    save(store, 1)
    file = store.directory(STEP_1) / MANIFEST
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    choice = choose(candidates(store), Expectation(2))
    assert choice.accepted is None
    assert not choice.verdicts[0].corrupt
    assert "format 2" in choice.verdicts[0].reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_not_called_corrupt(store: Store, save: Any) -> None:
    save(store, 1)
    (store.directory(STEP_1) / "rank-00000.json").chmod(0)
    (facts,) = candidates(store)
    assert facts.integrity.unreadable


def test_a_checkpoint_under_another_name_or_with_another_parent_is_found_out(
    store: Store, save: Any
) -> None:
    save(store, 1)
    save(store, 2, lineage=[STEP_1])
    shutil.copytree(store.directory(STEP_2), store.directory(STEP_3))
    assert f"id: expected {STEP_3}" in examine(store, store.directory(STEP_3)).integrity.problem
    store.delete(STEP_1)
    assert examine(store, store.directory(STEP_2)).integrity.ok, "an old parent may be deleted"
    save(store, 1, width=8)
    problem = examine(store, store.directory(STEP_2)).integrity.problem
    assert f"parent {STEP_1}: expected blake3:" in problem


def test_quarantine_keeps_the_bytes_and_says_why(store: Store, save: Any) -> None:
    places = []
    for _ in range(3):
        save(store, 1)
        content = (store.directory(STEP_1) / "rank-00000.pack").read_bytes()
        place = store.quarantine(STEP_1, "flipped")
        assert (place / "rank-00000.pack").read_bytes() == content
        assert json.loads((place / "reason.json").read_text())["reason"] == "flipped"
        places.append(place)
    assert store.committed() == store.uncommitted() == []
    assert store.quarantined() == sorted(set(places))
    assert len(places) == 3
    assert sweep(store) == []
    assert len(store.quarantined()) == 3


def test_a_sweep_removes_what_was_never_finished_and_nothing_else(
    store: Store, snaps: Snaps, save: Any
) -> None:
    save(store, 1)
    PartWriter(store, share=False).persist(snaps(2)[0])
    (store.directory(STEP_1) / f"{files.TEMPORARY}9-manifest.json").write_text("half")
    (store.root / "README").write_text("mine")
    assert len(sweep(store)) == 2
    assert sorted(p.name for p in store.root.iterdir()) == ["README", STEP_1]
    assert examine(store, store.directory(STEP_1), deep=True).integrity.ok


def test_what_others_have_put_under_the_name_of_a_checkpoint_is_never_removed(
    store: Store, snaps: Snaps, save: Any
) -> None:
    save(store, 1)
    PartWriter(store, share=False).persist(snaps(2)[0])
    mine = [
        store.root / "step-0000000003.best" / "model.pt",
        store.directory(STEP_2) / "notes.txt",
        store.root / f"{files.TEMPORARY}mine" / "rank-00000.pack",
        store.root / f"{files.TEMPORARY}{STEP_3}" / "evaluation" / "rank-00000.json",
    ]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (store.root / "step-0000000004.best").symlink_to(mine[0].parent)
    there = sorted(path.name for path in store.root.iterdir() if not is_grave(path))
    sweep(store)
    assert [file.exists() for file in mine] == [True, True, True, False]
    assert (store.directory(STEP_3) / "evaluation" / "rank-00000.json").read_text() == "mine"
    assert sorted(path.name for path in store.root.iterdir()) == sorted([*there, STEP_3])
    assert sweep(store) == []


def test_a_checkpoint_is_deleted_without_what_others_have_put_into_it(
    store: Store, save: Any
) -> None:
    save(store, 1)
    (store.directory(STEP_1) / "samples").mkdir()
    (store.directory(STEP_1) / "metrics.csv").write_text("mine")
    store.delete(STEP_1)
    assert sorted(p.name for p in store.directory(STEP_1).iterdir()) == ["metrics.csv", "samples"]
    assert store.committed() == []
    assert [path.name for path in store.root.iterdir()] == [STEP_1]
    save(store, 2)
    store.delete(STEP_2)
    assert [path.name for path in store.root.iterdir()] == [STEP_1]


def test_a_path_that_is_no_checkpoint_is_a_problem_and_not_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path in (tmp_path, file, tmp_path / "absent"):
        facts = examine(Store(tmp_path), path, deep=True)
        assert not facts.integrity.ok
        assert "manifest.json: expected a file, found none" in facts.integrity.problem
