from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from autoglm_resume.checkpoint.dcp import Reader, Writer
from autoglm_resume.checkpoint.dcp.metadata import from_json, to_json
from autoglm_resume.checkpoint.format.part import pack_file
from autoglm_resume.checkpoint.store.commit import complete
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CorruptCheckpoint, UsageError
from tests.checkpoint.dcp.states import (
    ID,
    check_sharded,
    equal,
    flip,
    list_to_dict,
    load,
    plain_save,
    save,
    save_sharded,
    sharded,
    state,
    tensors,
    whole,
)
from tests.checkpoint.ranks import DIED, ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_replicated_tensors_are_stored_once_and_shared_out(tmp_path: Path) -> None:
    def train(rank: int) -> None:
        save(tmp_path / "step-100", compress="off")
        assert equal(load(tmp_path / "step-100", state(2)), state(1))

    ranks(tmp_path, 2, train)
    facts = examine(Store(tmp_path), tmp_path / ID, deep=True)
    assert facts.integrity.ok
    once = sum(t.numel() * t.element_size() for t in tensors(state(1)))
    assert once < facts.raw < once + 20_000
    assert all(part.tensors for part in facts.parts)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("by-two")
    save_sharded(root, plain_save)
    return root


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_of_two_ranks_are_loaded_by_one_two_and_three(by_two: Path, world_size: int) -> None:
    check_sharded(by_two, world_size)


def in_the_background(kind: AsyncCheckpointerType) -> Callable[[dict[str, Any], Path], None]:
    def save(states: dict[str, Any], path: Path) -> None:
        saving = dcp.async_save(
            states,
            checkpoint_id=path,
            storage_writer=Writer(),
            async_checkpointer_type=kind,
        )
        for tensor in tensors(states):  # the next step begins
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
        saving.result()  # type: ignore[union-attr]

    return save


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_a_save_in_the_background_holds_the_state_of_its_step(
    tmp_path: Path, kind: AsyncCheckpointerType
) -> None:
    save_sharded(tmp_path, in_the_background(kind))
    check_sharded(tmp_path, 2)


def test_bad_bytes_that_one_rank_reads_leave_the_models_of_all_ranks_alone(
    tmp_path: Path,
) -> None:
    save_sharded(tmp_path, plain_save)
    flip(tmp_path / ID / pack_file(1), 10)

    def train(rank: int) -> None:
        model, optimizer = sharded(2)
        before = whole(model, optimizer)
        into = list_to_dict(get_state_dict(model, optimizer))
        with pytest.raises(CheckpointException) as raised:
            dcp.load(into, storage_reader=Reader(tmp_path / "step-100"))
        assert list(raised.value.failures) == [1]
        after = whole(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    ranks(tmp_path, 2, train)


class Dying(Writer):
    """Is killed when all ranks have written."""

    def finish(self, metadata: Any, results: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_before_the_commit_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def train(rank: int) -> None:
        try:
            dcp.save(state(1), checkpoint_id=tmp_path / "step-100", storage_writer=Dying())
        except Exception:
            os._exit(0)

    assert ranks(tmp_path, 2, train) == [DIED, DIED]
    store = Store(tmp_path)
    assert (tmp_path / ID / pack_file(0)).exists()
    assert not store.committed()
    assert not complete(store)
    save(tmp_path / "step-100", seed=3)  # by one rank, in the same place
    assert equal(load(tmp_path / "step-100", state(2)), state(3))
    assert examine(store, tmp_path / ID, deep=True).integrity.ok


def test_cached_plans_make_good_checkpoints(tmp_path: Path) -> None:
    def train(rank: int) -> None:
        for step in (1, 2, 3):
            dcp.save(
                state(step),
                checkpoint_id=tmp_path / f"step-{step}",
                storage_writer=Writer(compress="off"),
                planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            )

    ranks(tmp_path, 2, train)
    for step in (1, 2, 3):
        assert equal(load(tmp_path / f"step-{step}", state(9)), state(step))


def test_metadata_survives_json(by_two: Path) -> None:
    metadata = Reader(by_two / "step-100").read_metadata()
    assert metadata.planner_data["model.0.weight"] == ("model", "0.weight")
    document = to_json(metadata, metadata.storage_data)
    again = from_json(document, "file")
    again.storage_meta = metadata.storage_meta
    assert again == metadata
    with pytest.raises(UsageError, match="found it unwritten"):
        to_json(metadata, {})
    with pytest.raises(CorruptCheckpoint, match="not as it was written"):
        from_json({**document, "entries": [["model.0.weight", {"dtype": "float32"}]]}, "file")
