from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume import files
from autoglm_resume.checkpoint.format.ids import checkpoint_id, newest_first
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.replicas.mirror import committed, replicate
from autoglm_resume.checkpoint.replicas.plan import by_checkpoint, is_complete
from autoglm_resume.checkpoint.replicas.repair import repair, restore_missing
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.storage.directory import Directory
from autoglm_resume.checkpoint.storage.storage import Storage, open_storage
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

RUN = "run"


def train(root: Path, steps: tuple[int, ...] = (10, 20, 30), seed: int = 0) -> Store:
    """A store with checkpoints of two ranks, each sharing chunks with the ones before."""
    store = Store(root)
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.randn(300_000, generator=generator)
    weights = [torch.randn(300_000, generator=generator) for _ in range(2)]
    savers = [PartWriter(store, SaveOptions(compress="small"), share=False) for _ in range(2)]
    ids: list[str] = []
    for step in steps:
        for rank, saver in enumerate(savers):
            weights[rank] += 1e-6 * torch.randn(300_000, generator=generator)
            state = {"frozen": frozen, "w": weights[rank].clone()}
            taken = capture.take(
                {"model": state},
                id=checkpoint_id(step, "a0"),
                rank=rank,
                world_size=2,
                lineage=ids[::-1],
                created=seed * 1000.0 + step,
            )
            saver.persist(taken)
        ids.append(taken.id)
    return store


def copy_all(store: Store, storage: Storage) -> int:
    here = committed(store, {})
    there = by_checkpoint(storage.names())
    return sum(replicate(store, id, here, there, storage) for id in newest_first(here))


def bytes_of(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return train(tmp_path_factory.mktemp("trained") / "checkpoints")


@pytest.fixture
def store(trained: Store, tmp_path: Path) -> Store:
    shutil.copytree(trained.root, tmp_path / "checkpoints")
    return Store(tmp_path / "checkpoints")


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "replica").mkdir()
    return str(tmp_path / "replica")


@pytest.fixture
def replica(store: Store, target: str) -> Storage:
    storage = open_storage(target, RUN)
    copy_all(store, storage)
    return storage


class TestReplicate:
    def test_a_checkpoint_and_what_it_needs_are_copied_once(
        self, store: Store, target: str
    ) -> None:
        storage = open_storage(target, RUN)
        here = committed(store, {})
        newest, *_, oldest = newest_first(here)
        assert here[newest].needs, "nothing is shared, and nothing is tested"
        there: dict[str, dict[str, int]] = {}
        replicate(store, newest, here, there, storage)
        assert there == by_checkpoint(storage.names())
        assert oldest in there
        copy_all(store, storage)
        assert bytes_of(Path(target) / RUN) == bytes_of(store.root)
        assert copy_all(store, storage) == 0

    def test_damage_is_not_spread(self, store: Store, target: str) -> None:
        newest = store.latest()
        assert newest is not None
        flip(newest / "rank-00000.pack")
        storage = open_storage(target, RUN)
        with pytest.raises(CorruptCheckpoint, match="not replicated"):
            replicate(store, newest.name, committed(store, {}), {}, storage)
        assert not any(name.startswith(newest.name) for name in storage.names())

    @pytest.mark.parametrize("gone", ["all of it", "half of it"])
    def test_what_was_retired_meanwhile_is_not_called_damaged(
        self, store: Store, target: str, gone: str
    ) -> None:
        here = committed(store, {})
        newest = newest_first(here)[0]

        class Slow(Directory):
            def put(self, name: str, path: Path) -> int:
                sent = super().put(name, path)
                if newest in name:
                    store.delete(newest)
                return sent

        if gone == "all of it":
            store.delete(newest)
        with pytest.raises(FileNotFoundError, match=newest):
            replicate(store, newest, here, {}, Slow(Path(target), RUN))

    def test_a_manifest_is_not_sent_before_the_rest_is_listed(
        self, store: Store, target: str
    ) -> None:
        class Forgetful(Directory):
            def put(self, name: str, path: Path) -> int:
                return 0 if name.endswith("1.pack") else super().put(name, path)

        storage = Forgetful(Path(target), RUN)
        with pytest.raises(OSError, match=r"rank-00001\.pack: expected \d+ bytes .* found None"):
            copy_all(store, storage)
        assert not any(name.endswith(MANIFEST) for name in storage.names())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def zero(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    *(("rank-00000.pack", damage) for damage in (flip, zero, truncate, Path.unlink)),
    *(("rank-00001.json", damage) for damage in (flip, Path.unlink)),
    *((MANIFEST, damage) for damage in (flip, Path.unlink)),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
@pytest.mark.parametrize("which", ["newest", "needed"])
def test_a_damaged_file_is_replaced_by_a_good_copy(
    store: Store, replica: Storage, which: str, file: str, damage: Callable[[Path], None]
) -> None:
    before = bytes_of(store.root)
    newest = store.latest()
    assert newest is not None
    id = newest.name if which == "newest" else store.load_manifest(newest).needs[-1]
    damage(store.directory(id) / file)
    assert repair(store, newest.name, [replica]) == [store.directory(id) / file]
    assert bytes_of(store.root) == before
    assert examine(store, newest, deep=True).integrity.ok
    assert repair(store, newest.name, [replica]) == []


def test_a_whole_directory_that_is_needed_comes_back(store: Store, replica: Storage) -> None:
    before = bytes_of(store.root)
    newest = store.latest()
    assert newest is not None
    need = store.load_manifest(newest).needs[-1]
    shutil.rmtree(store.directory(need))
    assert len(repair(store, newest.name, [replica])) == 5
    assert bytes_of(store.root) == before


@pytest.mark.parametrize("file", ["rank-00000.pack", "rank-00000.json", MANIFEST])
def test_a_bad_copy_is_passed_over_and_a_good_one_found(
    store: Store, replica: Storage, target: str, tmp_path: Path, file: str
) -> None:
    good = tmp_path / "good"
    shutil.copytree(target, good)
    newest = store.latest()
    assert newest is not None
    before = bytes_of(store.root)
    flip(newest / file)
    flip(Path(target) / RUN / newest.name / file)
    damaged = bytes_of(store.root)
    with pytest.raises(CheckpointError) as caught:
        repair(store, newest.name, [replica])
    assert target in str(caught.value)
    assert bytes_of(store.root) == damaged, "nothing unproven takes a file's place"
    repair(store, newest.name, [replica, open_storage(str(good), RUN)])
    assert bytes_of(store.root) == before


def test_a_manifest_of_another_checkpoint_is_no_copy(store: Store, target: str) -> None:
    newest, older, *_ = store.committed()
    place = Path(target) / RUN / newest.name
    place.mkdir(parents=True)
    shutil.copy(older / MANIFEST, place)
    (newest / MANIFEST).unlink()
    with pytest.raises(CorruptCheckpoint, match="id: expected"):
        repair(store, newest.name, [open_storage(target, RUN)])


def test_a_manifest_that_is_not_the_known_one_is_no_copy(store: Store, replica: Storage) -> None:
    newest = store.latest()
    assert newest is not None
    known = store.load_manifest(newest).digest
    assert repair(store, newest.name, [replica], known) == []
    with pytest.raises(CorruptCheckpoint, match="digest: expected"):
        repair(store, newest.name, [replica], "blake3:" + 64 * "0")


class TestRestore:
    def test_the_newest_checkpoint_comes_back_with_all_it_needs(
        self, store: Store, replica: Storage, target: str, tmp_path: Path
    ) -> None:
        empty = Store(tmp_path / "new" / "checkpoints")
        restored = restore_missing(empty, [target])
        assert restored is not None
        newest = store.committed()[0].name
        assert (restored.run, restored.id) == (RUN, newest)
        here = committed(empty, {})
        assert is_complete(newest, here, by_checkpoint(replica.names()))
        assert set(here) == {newest, *here[newest].needs}
        assert bytes_of(empty.root).items() <= bytes_of(store.root).items()
        assert examine(empty, empty.directory(newest), deep=True).integrity.ok

    def test_a_newest_one_that_no_target_has_whole_is_passed_over(
        self, store: Store, replica: Storage, target: str, tmp_path: Path
    ) -> None:
        newest, older, *_ = store.committed()
        flip(Path(target) / RUN / newest.name / "rank-00001.pack")
        empty = Store(tmp_path / "new")
        restored = restore_missing(empty, [target])
        assert restored is not None
        assert restored.id == older.name
        assert not empty.directory(newest.name).exists()
        assert not list(empty.root.glob(f"{files.TEMPORARY}*"))

    def test_targets_complete_each_other(
        self, store: Store, replica: Storage, target: str, tmp_path: Path
    ) -> None:
        second = tmp_path / "second"
        shutil.copytree(target, second)
        newest = store.committed()[0].name
        flip(Path(target) / RUN / newest / "rank-00001.pack")
        (second / RUN / newest / "rank-00000.pack").unlink()
        restored = restore_missing(Store(tmp_path / "new"), [target, str(second)])
        assert restored is not None
        assert restored.id == newest

    def test_without_a_run_it_is_the_one_that_committed_last(
        self, store: Store, replica: Storage, target: str, tmp_path: Path
    ) -> None:
        later = train(tmp_path / "later", steps=(5,), seed=1)
        copy_all(later, open_storage(target, "later"))
        found = restore_missing(Store(tmp_path / "any"), [target])
        assert found is not None
        assert (found.run, found.id) == ("later", checkpoint_id(5, "a0"))
        found = restore_missing(Store(tmp_path / "own"), [target], RUN)
        assert found is not None
        assert (found.run, found.id) == (RUN, checkpoint_id(30, "a0"))

    def test_no_copy_and_no_answer_are_different_things(self, target: str, tmp_path: Path) -> None:
        empty = Store(tmp_path / "new")
        assert restore_missing(empty, [target]) is None
        with pytest.raises(OSError, match="mount"):
            restore_missing(empty, [target, str(tmp_path / "nowhere")])

    def test_copies_that_are_all_bad_are_an_error(
        self, store: Store, replica: Storage, target: str, tmp_path: Path
    ) -> None:
        for path in Path(target).rglob("*.pack"):
            flip(path)
        with pytest.raises(CheckpointError, match="no replica has a good copy"):
            restore_missing(Store(tmp_path / "new"), [target])


def test_everything_works_the_same_over_s3(
    store: Store, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(store.root)
    storage = open_storage(s3.url, RUN)
    assert copy_all(store, storage) == sum(map(len, before.values()))
    assert copy_all(store, storage) == 0
    newest = store.committed()[0]
    flip(newest / "rank-00000.pack")
    assert repair(store, newest.name, [storage]) == [newest / "rank-00000.pack"]
    assert bytes_of(store.root) == before
    empty = Store(tmp_path / "new")
    restored = restore_missing(empty, [s3.url])
    assert restored is not None
    assert (restored.run, restored.id) == (RUN, newest.name)
    assert examine(empty, empty.directory(newest.name), deep=True).integrity.ok
