from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from autoglm_resume.checkpoint.dcp import Reader, Writer, directory_of, newest
from autoglm_resume.checkpoint.dcp.metadata import key_of
from autoglm_resume.checkpoint.format.part import pack_file, part_file
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from tests.checkpoint.dcp.states import ID, equal, flip, load, save, state
from tests.patience import PATIENCE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
