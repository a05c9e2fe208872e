"""What a session's objects get back, with as many ranks or with others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.chunks.cut import items_of
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.state.restore import RestoredPart
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import in_memory
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CorruptCheckpoint, WorldSizeMismatch
from autoglm_resume.events import Resharded
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.worker.base import rng
from autoglm_resume.worker.feed.sampler import ResumableSampler
from autoglm_resume.worker.state import restoring

ID = checkpoint_id(3, "a0")


def objects(ranks: int, rank: int = 0) -> dict[str, Any]:
    sampler = ResumableSampler(40, 4, rank=rank, world_size=ranks)
    return {"model": torch.nn.BatchNorm1d(2), "sampler": sampler}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A checkpoint of three ranks that differ in their generators and a running mean."""
    store, kept = Store(tmp_path), rng.capture()
    for rank in range(3):
        tracked = objects(3, rank)
        tracked["sampler"].advance()
        tracked["model"].running_mean.fill_(rank)
        rng.derive(f"rank {rank}")
        states = {name: obj.state_dict() for name, obj in tracked.items()} | {"rng": rng.capture()}
        snapshot = capture.take(states, id=ID, rank=rank, world_size=3)
        PartWriter(store, share=False).persist(snapshot)
    rng.restore(kept)
    return store


def read(store: Store, rank: int, ranks: int) -> RestoredPart:
    point = ResumePoint(ID, 3, store.load_manifest(store.directory(ID)).digest)
    return restoring.read(point, store, rank, ranks, objects(ranks, rank), {}, None)


def draws(store: Store, rank: int, ranks: int) -> tuple[float, float]:
    kept = rng.capture()
    restoring.generators(read(store, rank, ranks), rank)
    drawn = float(torch.rand(())), random.random()
    rng.restore(kept)
    return drawn


def test_ranks_that_were_there_keep_their_generators_and_new_ones_get_their_own(
    store: Store,
) -> None:
    before = [draws(store, rank, 3) for rank in range(3)]
    assert [draws(store, rank, 2) for rank in range(2)] == before[:2]
    after = [draws(store, rank, 5) for rank in range(5)]
    assert after[:3] == before
    assert len(set(after)) == 5
    assert after == [draws(store, rank, 5) for rank in range(5)], "again the same"


def test_buffers_follow_rank_zero_where_all_have_the_same_parameters(store: Store) -> None:
    restored = read(store, 1, 2)
    assert restored.states["model"]["running_mean"].tolist() == [0, 0]
    assert restored.led == {"model/running_mean"}
    said = restoring.resharded(restored, 2, objects(2))
    assert said.rank_zeros == ("model/running_mean",)
    assert "rank 0's" in restoring.told_of_buffers(said.rank_zeros)
    restored = read(store, 1, 3)
    assert restored.states["model"]["running_mean"].tolist() == [1, 1]
    assert not restored.led


def test_modules_of_other_parameters_are_not_one_model(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for rank in range(3):
        norm = torch.nn.BatchNorm1d(2)
        norm.weight.data.fill_(rank)
        snapshot = capture.take({"model": norm.state_dict()}, id=ID, rank=rank, world_size=3)
        PartWriter(store, share=False).persist(snapshot)
    with pytest.raises(WorldSizeMismatch, match="model/weight: rank 1 had another one"):
        read(store, 1, 2)


def test_the_position_in_the_data_is_everybodys(store: Store) -> None:
    assert read(store, 4, 5).states["sampler"]["consumed"] == 12
    with pytest.raises(WorldSizeMismatch, match="28 samples are left in epoch 0"):
        read(store, 0, 29)


def test_what_changes_is_said(store: Store) -> None:
    changed = Resharded(from_=3, to=5, global_batch=20, seeded_anew=(3, 4))
    assert restoring.resharded(read(store, 0, 3), 5, objects(5)) == changed


def test_another_checkpoint_than_the_gate_saw_is_not_loaded(store: Store) -> None:
    point = ResumePoint(ID, 3, "blake3:another")
    with pytest.raises(CorruptCheckpoint, match="as the gate saw it"):
        restoring.read(point, store, 0, 3, objects(3), {}, None)


def test_a_snapshot_in_memory_is_what_was_sealed_or_nothing(store: Store) -> None:
    tracked = objects(3)
    taken = capture.take({n: o.state_dict() for n, o in tracked.items()}, id=ID, rank=0,
                         world_size=3)  # fmt: skip
    names = [item.named().name for item in items_of(taken)]
    point = ResumePoint(ID, 3, "", (in_memory.seal(taken, names),) * 3)
    found = restoring.read(point, store, 0, 3, tracked, {}, taken)
    assert found.from_memory
    assert found.states["sampler"] == tracked["sampler"].state_dict()
    PartWriter(Store(store.root / "other"), share=False).persist(replace(taken, world_size=1))
    stored = Store(store.root / "other").load_part(store.root / "other" / ID, 0)
    assert found.part.objects == stored.objects, "as if it had been on storage"
    taken.tensors[0].data[3] ^= 1
    with pytest.raises(CorruptCheckpoint, match="expected seal"):
        restoring.read(point, store, 0, 3, tracked, {}, taken)
    with pytest.raises(CorruptCheckpoint, match="not in memory any more"):
        restoring.read(point, store, 0, 3, tracked, {}, None)
