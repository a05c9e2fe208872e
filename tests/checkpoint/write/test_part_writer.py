from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.chunks.verify import fingerprint
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import pack_writer
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed

Snaps = Callable[..., list[Snapshot]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def files_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def test_a_part_is_a_pack_and_a_document_and_the_last_rank_commits(
    tmp_path: Path, snaps: Snaps
) -> None:
    store = Store(tmp_path / "not" / "there" / "yet")
    first, second = snaps(3)
    assert PartWriter(store, share=False).persist(first).manifest is None
    assert store.latest() is None
    saved = PartWriter(store, share=False).persist(second)
    part = saved.part
    path = store.directory(first.id)
    assert store.latest() == path
    assert files_in(path) == [
        "manifest.json",
        "rank-00000.json",
        "rank-00000.pack",
        "rank-00001.json",
        "rank-00001.pack",
    ]
    assert store.load_manifest(path) == saved.manifest
    assert store.load_part(path, 1) == part
    assert part.fingerprint == fingerprint(path / part.pack)


def test_equal_chunks_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(3 * CHUNK_BYTES // 8)
    state = {"a": weight, "b": weight.clone(), "zeros": torch.zeros(CHUNK_BYTES)}
    store = Store(tmp_path)
    taken = capture.take({"m": state}, id=checkpoint_id(1, "a0"), rank=0, world_size=1)
    part = PartWriter(store, SaveOptions("off")).persist(taken).part
    assert part.raw == taken.nbytes == 7 * CHUNK_BYTES
    assert part.stored == CHUNK_BYTES * 5 // 2
    back = restore.read(store, store.directory(taken.id), 0).states["m"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_packs_of_several_windows_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_writer, "WINDOW_BYTES", 2 * CHUNK_BYTES)
    weight = torch.randn(9 * CHUNK_BYTES // 8)
    store = Store(tmp_path)
    taken = capture.take({"m": {"w": weight}}, id=checkpoint_id(1, "a0"), rank=0, world_size=1)
    PartWriter(store, share=False).persist(taken)
    assert examine(store, store.directory(taken.id), deep=True).integrity.ok
    assert torch.equal(restore.read(store, store.directory(taken.id), 0).states["m"]["w"], weight)


def test_a_full_disk_fails_the_save_and_leaves_the_one_before(
    small_disk: Path, snaps: Snaps, save: Any
) -> None:
    store = Store(small_disk / "ckpt")
    old = save(store, 1)
    for taken in snaps(2, width=800):
        with pytest.raises(SaveFailed) as caught:
            PartWriter(store, share=False).persist(taken)
        assert "No space left" in caught.value.message
        assert f"needs {taken.nbytes:,} bytes" in caught.value.message
        assert f"{taken.id}/rank-0000{taken.rank}.pack" in caught.value.message
    assert files_in(store.directory("step-0000000002.a0")) == []
    assert store.latest() == store.directory(old)
    assert examine(store, store.directory(old), deep=True).integrity.ok
    new = save(store, 3)
    assert store.latest() == store.directory(new)


def test_a_disk_that_fills_up_leaves_nothing_or_what_only_lacks_its_manifest(
    small_disk: Path, tmp_path: Path, snaps: Snaps
) -> None:
    """Room for the pack, and for hardly anything more."""
    (taken,) = snaps(1, ranks=1, width=256)
    size = PartWriter(Store(tmp_path / "large")).persist(taken).part.stored
    store = Store(small_disk)
    directory = store.directory(taken.id)
    ballast = small_disk / "ballast"
    left = []
    for spare in range(0, 40 * 4096, 4096):
        ballast.write_bytes(bytes((2 << 20) - size - spare))
        try:
            PartWriter(store).persist(taken)
        except SaveFailed:
            left.append(files_in(directory))
            store.delete(taken.id)
        else:
            break
        ballast.unlink()
    assert [] in left
    assert all(names in ([], ["rank-00000.json", "rank-00000.pack"]) for names in left)
    assert examine(store, directory, deep=True).integrity.ok


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, snaps: Snaps) -> None:
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(SaveFailed, match="ckpt") as caught:
        PartWriter(Store(tmp_path / "ckpt")).persist(snaps(1)[0])
    assert caught.value.exit_code == 1


def test_a_part_is_never_written_twice_and_a_second_try_only_commits(
    tmp_path: Path, snaps: Snaps
) -> None:
    store = Store(tmp_path)
    directory = store.directory("step-0000000001.a0")
    first = PartWriter(store, share=False).persist(snaps(1)[0])
    before = (directory / "rank-00000.json").stat()
    (directory / "manifest.json").unlink(missing_ok=True)
    assert PartWriter(store, share=False).persist(snaps(1)[0]) == first
    assert (directory / "rank-00000.json").stat() == before


def test_ranks_that_save_at_the_same_instant_agree_on_one_manifest(
    tmp_path: Path, snaps: Snaps
) -> None:
    fork = multiprocessing.get_context("fork")
    store = Store(tmp_path)
    for step in range(1, 6):
        barrier = fork.Barrier(4)

        def rank(taken: Snapshot, barrier: Any = barrier) -> None:
            barrier.wait()
            PartWriter(store, share=False).persist(taken)

        ranks = [fork.Process(target=rank, args=(s,)) for s in snaps(step, ranks=4, width=8)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * 4
        facts = examine(store, store.committed()[0], deep=True)
        assert (facts.step, facts.integrity.problem) == (step, "")
    assert not list(tmp_path.rglob(".tmp-*"))
