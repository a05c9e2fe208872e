"""Chunks, wherever they lie."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from autoglm_resume.checkpoint.chunks.reader import ChunkReader, pack_path
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES, Chunk
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

Damage = Callable[[Path], object]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two checkpoints of two ranks; the second needs the first in every way there is."""
    store = Store(tmp_path / "ckpt")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHUNK_BYTES // 2, generator=generator)
    drift = 1 + 1e-6 * torch.randn(CHUNK_BYTES // 2, generator=generator)
    frozen = torch.randn(CHUNK_BYTES // 4, generator=generator)
    savers = [PartWriter(store, SaveOptions("small")) for _ in (0, 1)]
    for step, state in enumerate([weight, weight * drift], 1):
        tensors = {"weight": state, "frozen": frozen, "half": state.bfloat16()}
        id = checkpoint_id(step, "a0")
        taken = [capture.take({"m": tensors}, id=id, rank=rank, world_size=2) for rank in (0, 1)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(PartWriter.persist, savers, taken))
    return store


def parts(path: Path) -> list[Part]:
    store = Store(path.parent)
    return [store.load_part(path, rank) for rank in (0, 1)]


def read(reader: ChunkReader, part: Part, chunk: Chunk) -> bytes:
    target = bytearray(chunk.raw)
    reader.read(part, chunk, memoryview(target), "here")
    return bytes(target)


def open_packs() -> int:
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # of the listing itself
            count += fd.readlink().suffix == ".pack"
    return count


def kinds(found: list[Part]) -> set[str]:
    """What there is among the chunks."""
    chunks = [chunk for part in found for chunk in part.chunks]
    return {
        "cast"
        if c.cast_of
        else "delta"
        if c.base is not None
        else "peer's"
        if c.pack is None
        else "older"
        if c.pack
        else "own"
        for c in chunks
    }


def test_every_chunk_of_every_rank_is_found_decoded_and_verified(store: Store) -> None:
    path = store.directory(checkpoint_id(2, "a0"))
    found = parts(path)
    assert kinds(found) == {"cast", "delta", "peer's", "older"}
    with ChunkReader(path, found) as reader:
        for part in found:
            for chunk in part.chunks:
                assert digest(read(reader, part, chunk)) == chunk.digest


def test_from_any_thread_and_each_file_is_opened_once(store: Store) -> None:
    path = store.directory(checkpoint_id(2, "a0"))
    found = parts(path)
    with ChunkReader(path, found) as reader, ThreadPoolExecutor(8) as pool:
        work = [(part, chunk) for part in found for chunk in part.chunks] * 10
        contents = list(pool.map(lambda pair: read(reader, *pair), work))
        assert open_packs() <= 4
    assert [digest(content) for content in contents] == [chunk.digest for _, chunk in work]
    assert open_packs() == 0


def test_what_is_in_quarantine_still_finds_what_it_needs_beside_it(store: Store) -> None:
    first, second = (store.directory(checkpoint_id(step, "a0")) for step in (1, 2))
    part = next(part for part in parts(second) if part.needs)
    assert pack_path(second, part, part.packs[0]) == second / part.pack
    assert pack_path(second, part, part.packs[1]) == first / part.pack
    moved = store.quarantine(second.name, "a test")
    assert pack_path(moved, part, part.packs[0]) == moved / part.pack
    assert pack_path(moved, part, part.packs[1]) == first / part.pack
    assert examine(store, moved, deep=True).integrity.ok


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swap(file: Path) -> None:
    other = file.with_name("rank-00000.pack" if "1" in file.stem else "rank-00001.pack")
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "damage", [flip, cut, Path.unlink, swap, lambda file: file.write_bytes(b"")]
)
@pytest.mark.parametrize("step", [1, 2])
def test_the_file_to_blame_is_named_whichever_of_the_checkpoints_it_is_in(
    store: Store, damage: Damage, step: int
) -> None:
    path = store.directory(checkpoint_id(2, "a0"))
    found = parts(path)
    bad = store.directory(checkpoint_id(step, "a0")) / "rank-00001.pack"
    damage(bad)
    failures = []
    with ChunkReader(path, found) as reader:
        for part in found:
            for chunk in part.chunks:
                try:
                    assert digest(read(reader, part, chunk)) == chunk.digest
                except CorruptCheckpoint as error:
                    failures.append(error.message)
    assert failures
    assert all(message.startswith(f"{bad}: ") for message in failures)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(store: Store) -> None:
    path = store.directory(checkpoint_id(1, "a0"))
    found = parts(path)
    part = next(part for part in found if part.stored)
    chunk = next(chunk for chunk in part.chunks if chunk.pack == 0)
    pack = path / part.pack
    pack.unlink()
    pack.symlink_to(pack.name)
    with ChunkReader(path, found) as reader, pytest.raises(CheckpointError) as caught:
        read(reader, part, chunk)
    assert not isinstance(caught.value, CorruptCheckpoint)
    assert f"{pack}: cannot be read: Too many levels" in caught.value.message
