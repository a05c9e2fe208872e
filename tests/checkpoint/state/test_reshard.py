"""Checkpoints of sharded tensors, restored on any number of ranks.

torch's fake process group lets one process be every rank in turn.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, debug
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture, reshard, restore, tree
from autoglm_resume.checkpoint.state.restore import OtherSharding
from autoglm_resume.checkpoint.state.sharding import Arrangement, Box, Present
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint, UsageError, WorldSizeMismatch

Mesh = tuple[int, ...]
Placements = Sequence[Any]


@contextlib.contextmanager
def being(rank: int, mesh: Mesh, names: Sequence[str] | None = None) -> Iterator[Any]:
    """A rank of a process group; the device mesh that its ranks form."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh))
    try:
        yield init_device_mesh("cpu", mesh, mesh_dim_names=tuple(names) if names else None)
    finally:
        dist.destroy_process_group()
        # What torch has planned for this rank it would take for the next one's.
        debug._clear_sharding_prop_cache()
        debug._clear_fast_path_sharding_prop_cache()


def sharded(full: torch.Tensor, mesh: Any, placements: Placements) -> torch.Tensor:
    arrangement = Arrangement(mesh, placements)
    box = arrangement.box(tuple(full.shape))
    local = full[box.within(Box.whole(tuple(full.shape)))].contiguous()
    return arrangement.wrap(local, tuple(full.shape))


def model_of(full: torch.Tensor, mesh: Any, placements: Placements) -> torch.nn.Module:
    module = torch.nn.Module()
    parameter = torch.nn.Parameter(sharded(full, mesh, placements))
    module.register_parameter("w", parameter)
    return module


def save(store: Store, full: torch.Tensor, mesh: Mesh, placements: Placements, **more: Any) -> Path:
    """By all ranks: a model, the optimizer's moment of its one parameter, and generators."""
    id = checkpoint_id(1, "a0")
    for rank in range(math.prod(mesh)):
        with being(rank, mesh) as there:
            moment = sharded(full * 2, there, placements)
            objects = {
                "model": model_of(full, there, placements).state_dict(),
                "optimizer": {"state": {0: {"step": torch.tensor(7.0), "m": moment}}},
                "rng": torch.tensor([rank]),
                **{name: value(rank) for name, value in more.items()},
            }
            identity = {"id": id, "rank": rank, "world_size": math.prod(mesh)}
            PartWriter(store, share=False).persist(capture.take(objects, **identity))
    return store.directory(id)


def load(path: Path, rank: int, full: torch.Tensor, mesh: Mesh, placements: Placements) -> Any:
    """As a rank of another group: what it restores, and the local part of what it should."""
    with being(rank, mesh) as there:
        model = model_of(torch.zeros_like(full), there, placements)
        present = Present({"model": model, "optimizer": torch.optim.AdamW(model.parameters())})
        restored = reshard.read(Store(path.parent), path, rank, present, own=["rng"])
        box = Arrangement(there, placements).box(tuple(full.shape))
        return restored.states, full[box.within(Box.whole(tuple(full.shape)))]


@st.composite
def spreads(draw: st.DrawFn, ndim: int) -> tuple[Mesh, Placements]:
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    one = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(ndim))])
    return mesh, [draw(one) for _ in mesh]


@given(data=st.data())
@settings(max_examples=25)
def test_a_sharded_tensor_comes_back_on_any_mesh_as_the_same_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    before = data.draw(spreads(len(shape)))
    after = data.draw(spreads(len(shape)))
    full = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    with tempfile.TemporaryDirectory() as root:
        path = save(Store(Path(root)), full, *before)
        for rank in range(math.prod(after[0])):
            states, expected = load(path, rank, full, *after)
            weight, moment = states["model"]["w"], states["optimizer"]["state"][0]["m"]
            assert (weight.shape, list(weight.placements)) == (full.shape, after[1])
            assert torch.equal(tree.local(weight), expected)
            assert torch.equal(tree.local(moment), expected * 2)
            assert states["optimizer"]["state"][0]["step"] == 7
        whole = reshard.read(Store(Path(root)), path, 0, own=["rng"]).states["model"]["w"]
        assert torch.equal(whole, full)


def test_tensors_of_many_chunks_are_read_only_where_they_are_needed(tmp_path: Path) -> None:
    full = torch.randn(2048, 1024)
    path = save(Store(tmp_path), full, (4,), [Shard(0)])
    done: list[int] = []
    with being(2, (8,)) as there:
        model = model_of(torch.zeros_like(full), there, [Shard(0)])
        present = Present({"model": model, "optimizer": torch.optim.SGD(model.parameters())})
        states = reshard.read(
            Store(tmp_path), path, 2, present, own=["rng"], progress=done.append
        ).states
    assert torch.equal(tree.local(states["model"]["w"]), full[512:768])
    assert sum(done) < 3 << 20


def test_a_rank_that_is_new_has_no_generators_of_its_own(tmp_path: Path) -> None:
    full = torch.randn(4)
    path = save(Store(tmp_path), full, (2,), [Shard(0)])
    found = [load(path, rank, full, (3,), [Shard(0)])[0].get("rng") for rank in range(3)]
    assert [None if state is None else int(state) for state in found] == [0, 1, None]


@pytest.mark.parametrize(
    ("differing", "place"),
    [
        ({"loader": lambda rank: {"cursor": [0, rank]}}, "loader.cursor"),
        ({"loader": lambda rank: {"at": torch.tensor(rank)}}, "loader/at"),
        ({"loader": lambda rank: {"a": 1} if rank else {"b": 1}}, "loader"),
    ],
)
def test_what_ranks_had_differently_is_refused_by_name(
    tmp_path: Path, differing: dict[str, Any], place: str
) -> None:
    full = torch.randn(4)
    path = save(Store(tmp_path), full, (2,), [Shard(0)], **differing)
    with pytest.raises(WorldSizeMismatch) as caught:
        load(path, 0, full, (1,), [Shard(0)])
    assert f"{place}: rank 1 had another one than rank 0" in caught.value.message
    assert "run with 2 ranks" in caught.value.hint


def test_tensors_that_rank_zero_leads_may_differ(tmp_path: Path) -> None:
    full = torch.randn(4)
    running: dict[str, Any] = {"norm": lambda rank: {"mean": torch.tensor([rank])}}
    path = save(Store(tmp_path), full, (2,), [Shard(0)], **running)
    with being(1, (3,)) as there:
        model = model_of(full, there, [Shard(0)])
        restored = reshard.read(
            Store(tmp_path), path, 1, Present({"model": model}), own=["rng"], led=["norm/mean"]
        )
    assert restored.states["norm"]["mean"] == 0
    assert restored.states["rng"] == 1


def test_plain_and_sharded_tensors_become_each_other(tmp_path: Path) -> None:
    full = torch.randn(5, 3)
    store, plain = Store(tmp_path / "plain"), {"model": {"w": full}}
    PartWriter(store).persist(capture.take(plain, id=checkpoint_id(1, "a0"), rank=0, world_size=1))
    states, expected = load(store.directory(checkpoint_id(1, "a0")), 1, full, (2,), [Shard(0)])
    assert torch.equal(tree.local(states["model"]["w"]), expected)
    path = save(Store(tmp_path), full, (2,), [Shard(0)])
    alone = torch.nn.Module()
    alone.register_parameter("w", torch.nn.Parameter(torch.zeros(5, 3)))
    present = Present({"model": alone, "optimizer": torch.optim.SGD(alone.parameters())})
    states = reshard.read(Store(tmp_path), path, 0, present, own=["rng"]).states
    assert torch.equal(states["model"]["w"], full)
    assert torch.equal(states["optimizer"]["state"][0]["m"], full * 2)


def test_shards_keep_the_order_in_which_they_lay_in_memory(tmp_path: Path) -> None:
    full = torch.arange(24.0).reshape(6, 4)

    def turned(mesh: Any) -> torch.nn.Module:
        module = model_of(full, mesh, [Shard(0)])
        arrangement = Arrangement(mesh, [Shard(0)])
        local = tree.local(module.w).detach().t().contiguous().t()
        module.w = torch.nn.Parameter(arrangement.wrap(local, (6, 4)))
        return module

    for rank in range(2):
        with being(rank, (2,)) as there:
            objects = {"model": turned(there).state_dict()}
            taken = capture.take(objects, id=checkpoint_id(1, "a0"), rank=rank, world_size=2)
            PartWriter(Store(tmp_path), share=False).persist(taken)
    path = Store(tmp_path).directory(checkpoint_id(1, "a0"))
    for count in (2, 3):
        with being(1, (count,)) as there:
            present = Present({"model": turned(there)})
            reader = restore.read if count == 2 else reshard.read
            weight = reader(Store(tmp_path), path, 1, present=present).states["model"]["w"]
            rows = 6 // count
            assert tree.local(weight).stride() == (1, rows)
            assert weight.stride() == (1, 6)
            assert torch.equal(tree.local(weight), full[rows : 2 * rows])
    whole = reshard.read(Store(tmp_path), path, 0).states["model"]["w"]
    assert whole.stride() == (1, 6)
    assert torch.equal(whole, full)


def test_one_flipped_bit_in_any_ranks_shard_is_found(tmp_path: Path) -> None:
    full = torch.randn(64, 64)
    path = save(Store(tmp_path), full, (2,), [Shard(0)])
    pack = path / "rank-00001.pack"
    content = bytearray(pack.read_bytes())
    content[5] ^= 1
    pack.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"rank-00001\.pack: model/w"):
        load(path, 0, full, (1,), [Shard(0)])


def test_the_same_ranks_read_their_own_shards_and_others_are_told(tmp_path: Path) -> None:
    full = torch.arange(10.0).reshape(5, 2)
    path = save(Store(tmp_path), full, (2, 2), [Replicate(), Shard(0)])
    with being(3, (2, 2)) as there:
        present = Present({"model": model_of(full, there, [Replicate(), Shard(0)])})
        states = restore.read(Store(tmp_path), path, 3, present=present).states
        assert torch.equal(tree.local(states["model"]["w"]), full[3:])
        assert isinstance(states["optimizer"]["state"][0]["m"], DTensor)
    with being(3, (4,)) as there:
        present = Present({"model": model_of(full, there, [Shard(0)])})
        with pytest.raises(OtherSharding, match="model/w"):
            restore.read(Store(tmp_path), path, 3, present=present)
        with pytest.raises(CheckpointError, match=r"optimizer/state\.0\.m: expected a mesh"):
            reshard.read(Store(tmp_path), path, 3, present, own=["rng"])


@pytest.mark.parametrize("placement", [Partial(), _StridedShard(0, split_factor=2)])
def test_what_is_no_box_of_the_tensor_is_refused(placement: Any) -> None:
    with being(0, (2,)) as mesh:
        tensor = DTensor.from_local(torch.zeros(2), mesh, [placement], run_check=False)
        with pytest.raises(UsageError, match=r"model/w: a DTensor with placements"):
            capture.gather({"model": {"w": tensor}})


def test_every_rank_of_every_world_has_the_same_model_hash() -> None:
    found = set()
    for mesh in ((1,), (2,), (3,)):
        for rank in range(mesh[0]):
            with being(rank, mesh) as there:
                model = model_of(torch.zeros(5, 2), there, [Shard(0)])
                found.add(capture.structure_of(model.state_dict()).hash)
    assert len(found) == 1


def test_boxes_know_what_they_share_and_where_it_lies() -> None:
    outer = Box((2, 0), (4, 6))
    assert outer.overlap(Box((0, 3), (3, 9))) == Box((2, 3), (1, 3))
    assert outer.overlap(Box((6, 0), (2, 2))) is None
    assert Box((3, 1), (2, 2)).span(outer) == (7, 15)
    assert Box((), ()).span(Box((), ())) == (0, 1)
