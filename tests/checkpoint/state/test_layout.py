"""Tensors come back as they lay in memory: in their order, with their gaps, sharing it."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import from_slot
from autoglm_resume.checkpoint.interop import formats
from autoglm_resume.checkpoint.interop.adopt import adopt
from autoglm_resume.checkpoint.interop.gather import gather
from autoglm_resume.checkpoint.state import capture, decoding, restore, tree
from autoglm_resume.checkpoint.state.strides import in_c_order
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CorruptCheckpoint
from autoglm_resume.worker.saving import device_copy

ID = checkpoint_id(1, "a0")
BASE = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)


def round_trip(state: Any) -> Any:
    encoded, tensors = tree.encode(state, "x")
    fresh = {n: t.resolve_conj().resolve_neg().contiguous().clone() for n, t in tensors}
    back = decoding.decode(json.loads(json.dumps(encoded)), fresh)
    assert not fresh
    return back


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In type, order in memory, and content."""
    ours, theirs = (
        (type(t), t.requires_grad, t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())
        for t in (one, other)
    )
    return ours == theirs and torch.equal(one, other)


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        BASE.to(memory_format=torch.channels_last),
        torch.zeros(8, 3, 1, 1).to(memory_format=torch.channels_last),
        torch.zeros(1, 2, 3, 3, 3).to(memory_format=torch.channels_last_3d),
        BASE.transpose(1, 2),
        BASE[:, ::2, 1:3],
        BASE[0, 0, :, 2:3],
        BASE[:1].expand(7, 3, 4, 5),
        BASE.reshape(-1).unfold(0, 5, 2),
        torch.tensor(2.0).expand(3, 0),
        torch.empty(0, 3).T,
        torch.empty_strided((0, 4), (7, 1)),
        torch.complex(BASE, BASE + 1).conj(),
        torch.complex(BASE, BASE + 1).conj().imag,
        torch.complex(BASE, BASE + 1).conj().imag.transpose(0, 3),
        torch.nn.Parameter(BASE.mT),
        torch.nn.Parameter(BASE, requires_grad=False),
        torch.ones(2, requires_grad=True),
        torch.ones(2, requires_grad=True) * 2,
    ],
    ids=lambda t: f"{list(t.shape)} {t.stride()}",
)
def test_a_tensor_comes_back_in_its_order_and_type(tensor: torch.Tensor) -> None:
    assert alike(round_trip(tensor), tensor)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    dims = draw(st.integers(0, 3))
    shape = [draw(st.integers(0, 3)) for _ in range(dims)]
    strides = [draw(st.integers(0, 6)) for _ in range(dims)]
    return base.as_strided(shape, strides, draw(st.integers(0, 8)))


@given(st.data())
@settings(max_examples=200)
def test_whatever_views_of_memory_a_state_holds_they_lie_together_as_they_did(
    data: st.DataObject,
) -> None:
    base = torch.arange(64, dtype=torch.float32)
    state = data.draw(st.lists(views(base) | views(base).map(lambda t: t.clone()), max_size=5))
    back = round_trip(state)
    assert all(map(alike, back, state))
    if state:
        # What is written through one of them is seen through the others.
        for both in (state, back):
            nth = min(range(len(both)), key=lambda i: -both[i].numel())
            for number, index in enumerate(torch.ones(both[nth].shape).nonzero()):
                both[nth][tuple(index)] = 100 + number
    assert all(map(torch.equal, back, state))


def test_one_tensor_in_two_places_comes_back_as_one() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    other = torch.ones(3)
    back = round_trip({"a": [weight, other], "b": (weight,), 5: {"c": weight}})
    assert back["a"][0] is back["b"][0] is back[5]["c"]
    assert type(back["a"][0]) is torch.nn.Parameter
    assert memory(back["a"][1]) != memory(back["a"][0])


def test_tied_weights_of_a_module_are_tied_again() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    back = round_trip(module.state_dict())
    assert isinstance(back, OrderedDict)
    assert memory(back["a.weight"]) == memory(back["b.weight"])
    assert memory(back["a.bias"]) != memory(back["b.bias"])


def test_tensors_of_several_types_may_lie_in_the_same_memory() -> None:
    flat = torch.zeros(64, dtype=torch.uint8)
    state = {"flat": flat, "numbers": flat[8:24].view(torch.float64), "z": flat[::3]}
    back = round_trip(state)
    back["numbers"].fill_(1.5)
    state["numbers"].fill_(1.5)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_tensors_side_by_side_in_one_memory_need_not_stay_there() -> None:
    flat = torch.zeros(6)
    back = round_trip([flat[:3], flat[3:]])
    assert memory(back[0])[0] != memory(back[1])[0]


def test_lists_dicts_and_sets_in_two_places_come_back_as_one() -> None:
    inner: list[Any] = [1]
    odd = {(1, 2): inner}
    state = {"a": inner, "b": [inner, odd], "c": (odd, {3}), "same": [[1], [1]]}
    back = round_trip(state)
    assert back == state
    assert back["a"] is back["b"][0] is back["b"][1][1, 2]
    assert back["b"][1] is back["c"][0]
    assert back["same"][0] is not back["same"][1]


def test_arrays_of_numpy_keep_their_order_and_stay_one() -> None:
    numpy = pytest.importorskip("numpy")
    fortran = numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))
    back = round_trip([fortran, fortran, fortran.copy(order="C"), numpy.zeros(3)])
    assert back[0] is back[1]
    assert [array.strides for array in back] == [(8, 16), (8, 16), (24, 8), (8,)]
    assert (back[0] == fortran).all()


def kept() -> dict[str, Any]:
    """A state whose tensors lie in many ways."""
    last = BASE.to(memory_format=torch.channels_last)
    shared = [3]
    return {
        "m": {
            "last": torch.nn.Parameter(last),
            "gaps": BASE[:, ::2, 1:3],
            "wide": BASE[0, 0, 0, :1].expand(300, 3),
            "tied": last,
            "row": last[0],
            "lists": [shared, shared],
        }
    }


def check(back: Any) -> None:
    expected = kept()["m"]
    for name, tensor in expected.items():
        if name != "lists":
            assert alike(back[name], tensor), name
    assert back["lists"][0] is back["lists"][1]
    assert memory(back["tied"]) == memory(back["row"]) == memory(back["last"])


def persisted(root: Path) -> Store:
    store = Store(root)
    PartWriter(store).persist(capture.take(kept(), id=ID, rank=0, world_size=1))
    return store


def test_storage_keeps_how_tensors_lie(tmp_path: Path) -> None:
    store = persisted(tmp_path)
    check(restore.read(store, store.directory(ID), 0).states["m"])


def test_snapshots_in_memory_keep_how_tensors_lie(tmp_path: Path) -> None:
    store = persisted(tmp_path)
    gathered = capture.gather(kept())
    identity = capture.Identity(ID, 0, 1)
    slot = memoryview(bytearray(gathered.size))
    copier = device_copy.DeviceCopier()
    copy = copier.copy(gathered, 0, slot, lambda error: None, at_once=False)
    copy.start()
    copy.wait()
    held = from_slot(gathered.describe(identity), slot)
    check(restore.read(store, store.directory(ID), 0, memory=held).states["m"])


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_exports_keep_how_tensors_lie(tmp_path: Path, kind: str) -> None:
    store = persisted(tmp_path / "from")
    formats.write(kind, tmp_path / "out", gather(store, store.directory(ID)))
    into = Store(tmp_path / "to")
    manifest = adopt(into, formats.read(tmp_path / "out"))
    check(restore.read(into, into.directory(manifest.id), 0).states["m"])
    if kind == "torch":
        check(torch.load(tmp_path / "out")["m"])


@pytest.mark.parametrize(
    "leaf",
    [
        {"strides": [1]},
        {"strides": [-4, 1]},
        {"strides": ["4", "1"]},
        {"strides": 3},
        {"memory": ["x/t"]},
        {"memory": ["x/t", 3]},
        {"memory": ["x/t", -16]},
        {"memory": 5},
        {"same": "x/none"},
        {"neg": True, "strides": None},
    ],
    ids=str,
)
def test_a_leaf_that_was_never_written_is_corrupt(leaf: Any) -> None:
    with pytest.raises(CorruptCheckpoint):
        decoding.decode({"$tensor": "x/t", **leaf}, {"x/t": torch.zeros(3, 4)})


@given(st.lists(st.integers(0, 4), max_size=4))
def test_strides_in_c_order_are_those_of_new_tensors(shape: list[int]) -> None:
    assert in_c_order(torch.Size(shape)) == torch.empty(shape).stride()
