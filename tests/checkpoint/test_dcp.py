from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard

from autoglm_resume.checkpoint.dcp import Reader, Writer, directory_of, newest
from autoglm_resume.checkpoint.dcp.metadata import from_json, key_of, to_json
from autoglm_resume.checkpoint.format.part import pack_file, part_file
from autoglm_resume.checkpoint.store.commit import complete
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CorruptCheckpoint, UsageError
from tests.checkpoint.ranks import DIED, ranks
from tests.patience import PATIENCE

ID = "step-0000000100.dcp"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(seed: int) -> dict[str, Any]:
    """A replicated state of more than one chunk, every kind of value in it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(700, 1000, generator=generator)
    return {
        "model": {
            "w": weight,
            "transposed": torch.randn(6, 4, generator=generator).T,
            "half": weight[:3].bfloat16(),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(float(seed)),
            "mask": weight[0] > 0,
        },
        "optimizer": {"state": {0: {"step": torch.tensor(float(seed))}}, "betas": (0.9, 0.95)},
        "step": seed,
        "a/odd name@0,0": torch.ones(2) * seed,
    }


def tensors(tree: object) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values: Sequence[object] = list(tree.values()) if isinstance(tree, dict) else []
    return [found for value in values for found in tensors(value)]


def equal(one: object, other: object) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def save(path: Path, seed: int = 1, **options: Any) -> Path:
    dcp.save(state(seed), checkpoint_id=path, storage_writer=Writer(**options))
    return directory_of(path)


def load(path: Path, into: dict[str, Any]) -> dict[str, Any]:
    dcp.load(into, storage_reader=Reader(path))
    return into


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


# A model of FSDP2, whose shards are of unequal size


def sharded(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.GELU(), torch.nn.Linear(53, 5))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 37)).sum().backward()
    optimizer.step()
    return model, optimizer


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = tensors(list_to_dict(get_state_dict(model, optimizer)))
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for t in found]


def list_to_dict(states: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), states, strict=True))


def save_sharded(root: Path, save: Callable[[dict[str, Any], Path], None]) -> None:
    """By two ranks, as step 100, with the whole tensors beside it in expected.pt."""

    def train(rank: int) -> None:
        model, optimizer = sharded(1)
        expected = whole(model, optimizer)
        save(list_to_dict(get_state_dict(model, optimizer)), root / "step-100")
        if rank == 0:
            torch.save(expected, root / "expected.pt")

    ranks(root, 2, train)


def plain_save(states: dict[str, Any], path: Path) -> None:
    dcp.save(states, checkpoint_id=path, storage_writer=Writer(compress="fast"))


def check_sharded(root: Path, world_size: int) -> None:
    """That ranks with another model and optimizer load all of expected.pt."""

    def train(rank: int) -> None:
        model, optimizer = sharded(2)
        into = list_to_dict(get_state_dict(model, optimizer))
        dcp.load(into, storage_reader=Reader(root / "step-100"))
        set_state_dict(
            model, optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"]
        )
        expected = torch.load(root / "expected.pt")
        found = whole(model, optimizer)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    ranks(root, world_size, train)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("step-100", ID),
        ("step_100", ID),
        ("global_step00100", ID),
        ("100", ID),
        ("epoch=3-step=100", ID),
        (ID, ID),
        ("step-0000000100.a3", "step-0000000100.a3"),
    ],
)
def test_a_path_that_ends_in_a_number_is_a_checkpoint_of_that_step(
    given: str, expected: str
) -> None:
    assert directory_of(f"some/where/{given}") == Path("some/where") / expected
    assert Writer.validate_checkpoint_id(given)


def test_any_other_path_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a name that ends in the step"):
        Writer("checkpoints/latest")
    assert not Reader.validate_checkpoint_id("checkpoints/latest")
    for nameless in (Writer(), Reader()):
        assert nameless.checkpoint_id is None
    with pytest.raises(CheckpointException, match="no checkpoint named"):
        dcp.save(state(1), storage_writer=Writer())


@pytest.mark.parametrize("compress", ["auto", "fast", "small", "off"])
def test_what_was_saved_is_loaded(tmp_path: Path, compress: str) -> None:
    path = save(tmp_path / "step-100", compress=compress)
    assert path == tmp_path / ID
    found = load(tmp_path / "step-100", state(2))
    assert equal(found, state(1))
    assert found["step"] == 1
    assert found["optimizer"]["betas"] == (0.9, 0.95)
    facts = examine(Store(tmp_path), path, deep=True)
    assert facts.integrity.ok
    assert (facts.stored < 0.99 * facts.raw) == (compress != "off")


def test_there_is_no_other_compression() -> None:
    with pytest.raises(UsageError, match="compress: expected one of"):
        Writer("step-1", compress="zip")  # type: ignore[arg-type]


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "step-100")
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointException, match="committed already, and never overwritten"):
        save(tmp_path / "step-100", seed=2)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_one_writer_serves_all_saves_of_a_run(tmp_path: Path) -> None:
    writer = Writer()
    for step in (1, 2):
        dcp.save(state(step), checkpoint_id=tmp_path / f"step-{step}", storage_writer=writer)
    store = Store(tmp_path)
    assert [path.name for path in store.committed()] == [
        "step-0000000002.dcp",
        "step-0000000001.dcp",
    ]
    assert newest(tmp_path) == tmp_path / "step-0000000002.dcp"
    store.delete("step-0000000002.dcp")
    assert equal(load(tmp_path / "step-1", state(3)), state(1))


def test_the_newest_is_one_that_proves_good(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing there") is None
    save(tmp_path / "step-1")
    second = save(tmp_path / "step-2")
    flip(second / pack_file(0), 1000)
    assert newest(tmp_path) == tmp_path / "step-0000000001.dcp"


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    save(tmp_path / "step-100")
    for command in ("inspect ckpt", "verify", "ckpts"):
        arguments = [*command.split(), str(tmp_path)]
        code = "from autoglm_resume.cli.app import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert ID in done.stdout


def refuse(path: Path, message: str) -> None:
    """Loading fails, and no live value is touched."""
    into = state(2)
    with pytest.raises(CheckpointException, match=message):
        load(path, into)
    assert equal(into, state(2))
    assert into["step"] == 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found_before_a_tensor_is_overwritten(
    tmp_path: Path, share: float
) -> None:
    path = save(tmp_path / "step-100", compress="off")
    pack = path / pack_file(0)
    flip(pack, int(pack.stat().st_size * share))
    refuse(tmp_path / "step-100", "expected blake3:")


def test_a_truncated_pack_is_found_before_a_tensor_is_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "step-100")
    os.truncate(path / pack_file(0), 1_000_000)
    refuse(tmp_path / "step-100", "bytes, found 1000000")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_metadata_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "step-100")
    flip(path / part_file(0), 500)
    refuse(tmp_path / "step-100", "expected blake3:")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    refuse(tmp_path / "step-100", "expected a file, found none")


def test_a_session_s_checkpoint_is_not_one_of_dcp(tmp_path: Path, save: Any) -> None:
    id = save(Store(tmp_path), 100)
    refuse(tmp_path / id, "not saved through DCP")


def test_a_tensor_that_only_pickle_could_save_is_refused(tmp_path: Path) -> None:
    sparse = {"model": {"w": torch.eye(3).to_sparse()}}
    with pytest.raises(CheckpointException, match=r"state/model\.w: .*cannot be saved"):
        dcp.save(sparse, checkpoint_id=tmp_path / "step-100", storage_writer=Writer())
    assert not Store(tmp_path).committed()


def test_one_checkpoint_per_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_collectives=False"):
        dcp.save(
            state(1),
            checkpoint_id=tmp_path / "step-100",
            storage_writer=Writer(),
            use_collectives=False,
        )


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


class OneBox(dcp.DefaultLoadPlanner):
    """Reads one box into a tensor of its own."""

    def __init__(self, lengths: torch.Size) -> None:
        super().__init__()
        self.target = torch.full(lengths, torch.nan)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A tensor of 7 chunks, the last of them short."""
    path = tmp_path_factory.mktemp("large") / "step-100"
    tensor = torch.randn(20, 300, 301, generator=torch.Generator().manual_seed(1))
    dcp.save({"t": tensor}, checkpoint_id=path, storage_writer=Writer(), no_dist=True)
    return path, tensor


@given(data=st.data())
@settings(max_examples=60)
def test_any_box_of_a_tensor_can_be_read(
    large: tuple[Path, torch.Tensor], data: st.DataObject
) -> None:
    path, tensor = large
    spans = []
    for size in tensor.shape:
        begin = data.draw(st.integers(0, size))
        spans.append((begin, data.draw(st.integers(begin, size))))
    offsets = torch.Size([begin for begin, _ in spans])
    lengths = torch.Size([end - begin for begin, end in spans])
    index = MetadataIndex("t", [0, 0, 0])
    item = ReadItem(LoadItemType.TENSOR, index, torch.Size([0, 0, 0]), index, offsets, lengths)
    reader = Reader(path)
    metadata = reader.read_metadata()
    assert key_of(index) in metadata.storage_data
    reader.set_up_storage_reader(metadata, True)
    planner = OneBox(lengths)
    reader.prepare_local_plan(LoadPlan([item]))
    reader.read_data(LoadPlan([item]), planner).wait()
    expected = tensor[tuple(slice(begin, end) for begin, end in spans)]
    assert torch.equal(planner.target, expected)
