from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.checkpoint.format.snapshot import (
    ALIGNMENT,
    Snapshot,
    TensorBytes,
    describe,
    from_slot,
    layout,
)
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.errors import UsageError

ID = "step-0000000003.a0"


def test_a_snapshot_holds_the_bytes_of_every_tensor_under_its_path() -> None:
    state = {"w": torch.arange(4, dtype=torch.int16).reshape(2, 2).T, "n": 3}
    taken = capture.take({"model": state}, id=ID, rank=1, world_size=2, lineage=("x",))
    (tensor,) = taken.tensors
    assert (tensor.name, tensor.dtype, tensor.shape) == ("model/w", "int16", (2, 2))
    assert bytes(tensor.data) == b"\0\0\2\0\1\0\3\0"
    assert taken.trees == {"model": {"w": {"$tensor": "model/w", "strides": [1, 2]}, "n": 3}}
    assert (taken.step, taken.nbytes, taken.lineage) == (3, 8, ("x",))
    assert taken.versions["torch"] == str(torch.__version__)


def test_tensors_in_host_memory_are_not_copied() -> None:
    weight = torch.zeros(4)
    taken = capture.take({"m": {"w": weight}}, id=ID, rank=0, world_size=1)
    weight.fill_(1)
    assert bytes(taken.tensors[0].data) == b"\0\0\x80\x3f" * 4


def test_what_cannot_be_saved_is_named_before_anything_is_written() -> None:
    state = {"order": [(x for x in ())]}
    with pytest.raises(UsageError, match=r"sampler/order\.0: a builtins\.generator"):
        capture.take({"sampler": state}, id=ID, rank=0, world_size=1)


def test_the_structure_of_a_module_is_its_parameters_and_buffers() -> None:
    found = capture.structure_of(torch.nn.BatchNorm1d(3).state_dict(), {"a.yaml": "blake3:0"})
    assert found.tensors == (
        ("bias", "float32", (3,)),
        ("num_batches_tracked", "int64", ()),
        ("running_mean", "float32", (3,)),
        ("running_var", "float32", (3,)),
        ("weight", "float32", (3,)),
    )
    assert found.config == (("a.yaml", "blake3:0"),)


# In a slot


def in_slot(snapshot: Snapshot, slot: bytearray) -> bytes:
    """Lay it there; returns its description."""
    offsets, _ = layout(len(tensor.data) for tensor in snapshot.tensors)
    for offset, tensor in zip(offsets, snapshot.tensors, strict=True):
        slot[offset : offset + len(tensor.data)] = tensor.data
    return describe(snapshot)


def everything(snapshot: Snapshot) -> dict[str, Any]:
    tensors = [(t.name, t.dtype, t.shape, bytes(t.data)) for t in snapshot.tensors]
    return {**vars(snapshot), "tensors": tensors}


texts = st.text(max_size=8)
tensors = st.builds(
    lambda name, dtype, shape, fill: (name, dtype, tuple(shape), fill),
    texts,
    st.sampled_from([("bool", 1), ("bfloat16", 2), ("float32", 4), ("complex128", 16)]),
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 255),
)
json_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(tensors, max_size=8), st.dictionaries(texts, json_trees, max_size=3), st.data())
def test_a_snapshot_in_a_slot_is_read_back_as_it_was(
    made: list[Any], trees: dict[str, Any], data: st.DataObject
) -> None:
    snapshot = Snapshot(
        id=ID,
        step=3,
        rank=1,
        world_size=4,
        lineage=tuple(data.draw(st.lists(texts, max_size=3))),
        created=data.draw(st.floats(0, 1e12)),
        versions=data.draw(st.dictionaries(texts, texts, max_size=2)),
        model=Structure.of([("w", "float32", (2, 3))], {"a": "b"})
        if data.draw(st.booleans())
        else None,
        trees=trees,
        tensors=[
            TensorBytes(name, dtype, shape, memoryview(bytes([fill]) * (size * math.prod(shape))))
            for name, (dtype, size), shape, fill in made
        ],
        rng=data.draw(st.booleans()),
        data=data.draw(st.booleans()),
        metrics=data.draw(st.dictionaries(texts, st.floats(-1e300, 1e300), max_size=2)),
    )
    slot = bytearray(100_000)
    text = in_slot(snapshot, slot)
    found = from_slot(text, memoryview(slot))
    assert everything(found) == everything(snapshot)
    assert describe(found) == text


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_tensors_in_a_slot_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    offsets, end = layout(sizes)
    ends = [*offsets, end][1:]
    assert all(offset % ALIGNMENT == 0 for offset in [*offsets, end])
    assert all(o + size <= next_ for o, size, next_ in zip(offsets, sizes, ends, strict=True))
    assert end <= sum(sizes) + ALIGNMENT * len(sizes)


def test_tensors_of_a_snapshot_in_a_slot_are_the_slot_itself() -> None:
    taken = capture.take({"m": {"w": torch.zeros(3)}}, id=ID, rank=0, world_size=1)
    slot = bytearray(1000)
    found = from_slot(in_slot(taken, slot), memoryview(slot))
    slot[0] = 7
    assert bytes(found.tensors[0].data) == b"\7" + bytes(11)


def test_a_state_can_be_described_before_it_is_copied() -> None:
    state = capture.gather({"m": {"w": torch.ones(3), "n": torch.zeros(0)}})
    identity = capture.Identity(ID, 0, 1, created=1.0)
    assert state.size == layout([12, 0])[1]
    assert state.describe(identity) == describe(state.in_place(identity))


def test_only_a_checkpoint_id_names_a_snapshot() -> None:
    with pytest.raises(ValueError, match="'x' is not a checkpoint id"):
        capture.take({}, id="x", rank=0, world_size=1)
