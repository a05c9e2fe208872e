"""Restoring, and what becomes of a checkpoint whose bytes were changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import Compress, SaveOptions
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, WorldSizeMismatch

ID = "step-0000000005.a0"
FILES = ("manifest.json", *(f"rank-0000{r}.{kind}" for r in (0, 1) for kind in ("json", "pack")))


@pytest.fixture(scope="module")
def pristine(save: Any) -> Iterator[Path]:
    """The directory of a checkpoint of two ranks, each with several chunks."""
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root))
        save(store, 5, width=600)
        yield store.directory(ID)


def test_every_object_comes_back_in_fresh_memory(pristine: Path, state: Any) -> None:
    store = Store(pristine.parent)
    done: list[int] = []
    for rank in (0, 1):
        expected = state(5, rank, 600)
        first = restore.read(store, pristine, rank, progress=done.append)
        assert repr(first.states) == repr(expected)
        for tensor in first.states["model"].values():
            tensor.zero_()
        again = restore.read(store, pristine, rank).states["model"]
        assert all(torch.equal(again[name], expected["model"][name]) for name in again)
    assert sum(done) == examine(store, pristine).raw


def test_tied_tensors_are_tied_after_a_restore(pristine: Path) -> None:
    model = restore.read(Store(pristine.parent), pristine, 0).states["model"]
    assert model["tied"] is model["w"]
    assert model["half"].data_ptr() != model["w"].data_ptr()


def test_a_rank_that_the_checkpoint_does_not_have_is_named(pristine: Path) -> None:
    with pytest.raises(WorldSizeMismatch, match="rank 2, found 2 parts"):
        restore.read(Store(pristine.parent), pristine, 2)


@pytest.mark.parametrize("compress", ["off", "fast"])
def test_the_damaged_tensor_is_named(tmp_path: Path, compress: Compress) -> None:
    store = Store(tmp_path)
    state = {"a": torch.randn(CHUNK_BYTES // 4), "b": torch.randn(CHUNK_BYTES // 2)}
    taken = capture.take({"m": state}, id=checkpoint_id(1, "a0"), rank=0, world_size=1)
    part = PartWriter(store, SaveOptions(compress)).persist(taken).part
    pack = store.directory(taken.id) / part.pack
    content = bytearray(pack.read_bytes())
    content[-1] ^= 0x80
    pack.write_bytes(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        restore.read(store, store.directory(taken.id), 0)
    assert caught.value.message.startswith(f"{pack}: m/b: ")
    if compress == "off":
        assert f"expected {part.chunks[-1].digest}, found blake3:" in caught.value.message


@given(data=st.data())
@settings(max_examples=120)
def test_no_change_to_any_file_goes_unnoticed(pristine: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    original = (pristine / name).read_bytes()
    start = data.draw(st.integers(0, len(original) - 1))
    end = min(len(original), start + data.draw(st.sampled_from([1, 7, 4096, CHUNK_BYTES])))
    kind = data.draw(st.sampled_from(["flip", "zero", "cut", "remove", "insert", "swap", "delete"]))
    bit = data.draw(st.integers(0, 7))
    changed: bytes | None = {
        "flip": original[:start] + bytes([original[start] ^ 1 << bit]) + original[start + 1 :],
        "zero": original[:start] + bytes(end - start) + original[end:],
        "cut": original[:start],
        "remove": original[:start] + original[end:],
        "insert": original[:start] + b"\0" * (end - start) + original[start:],
        "swap": (pristine / name.replace("0000", "0000").replace("00000", "00001")).read_bytes(),
        "delete": None,
    }[kind]
    assume(changed != original)
    with tempfile.TemporaryDirectory() as root:
        copy = Path(root) / ID
        shutil.copytree(pristine, copy)
        (copy / name).unlink()
        if changed is not None:
            (copy / name).write_bytes(changed)
        store = Store(Path(root))
        for deep in (False, True):
            facts = examine(store, copy, deep=deep)
            assert not facts.integrity.ok
            assert name in facts.integrity.problem
        for rank in (0, 1):
            if name in ("manifest.json", f"rank-0000{rank}.json", f"rank-0000{rank}.pack"):
                with pytest.raises(CheckpointError, match=name):
                    restore.read(store, copy, rank)
            else:
                restore.read(store, copy, rank)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_tensors_go_back_to_a_device_and_generators_stay_on_the_host(tmp_path: Path) -> None:
    store = Store(tmp_path)
    state = {"w": torch.randn(4, 5, device="cuda").T, "rng": torch.get_rng_state()}
    taken = capture.take({"m": state}, id=checkpoint_id(1, "a0"), rank=0, world_size=1)
    PartWriter(store).persist(taken)
    back = restore.read(store, store.directory(taken.id), 0, "cuda").states["m"]
    assert torch.equal(back["w"], state["w"])
    assert back["rng"].device.type == "cpu"
    assert restore.read(store, store.directory(taken.id), 0).states["m"]["w"].device.type == "cpu"
