from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoglm_resume.checkpoint.chunks.verify import Progress
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.interop import formats
from autoglm_resume.checkpoint.interop.adopt import adopt
from autoglm_resume.checkpoint.interop.formats import READERS, WRITERS, LayoutReader, layout_of
from autoglm_resume.checkpoint.interop.gather import gather
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, UsageError

Save = Callable[..., str]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_layout_that_is_written_is_recognised_by_its_own_reader_alone(
    tmp_path: Path, save: Save
) -> None:
    store = Store(tmp_path / "store")
    path = store.directory(save(store, 3))
    assert READERS.keys() >= WRITERS.keys()
    for name in WRITERS:
        formats.write(name, tmp_path / name, gather(store, path))
        assert layout_of(tmp_path / name) == name
        assert [n for n, each in READERS.items() if each.recognises(tmp_path / name)] == [name]


@pytest.mark.parametrize(
    ("name", "says"),
    [("nothing", "no such file"), ("empty", "an empty file"), ("folder", "found no .metadata")],
)
def test_what_no_reader_recognises_is_refused_by_what_it_is(
    tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=says):
        formats.read(tmp_path / name)


class Numbers:
    """A layout of somebody else: a directory with one file of float32 per rank."""

    step = 7

    def __init__(self, source: Path) -> None:
        self.files = sorted(source.glob("*.f32"))
        self.raw = sum(file.stat().st_size for file in self.files)

    def snapshots(self, id: str, progress: Progress | None = None) -> list[Snapshot]:
        taken = []
        for rank, file in enumerate(self.files):
            numbers = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
            if not numbers.isfinite().all():
                raise CheckpointError(f"{file}: expected finite numbers")
            state = {"model": {"w": numbers}}
            taken.append(capture.take(state, id=id, rank=rank, world_size=len(self.files)))
            if progress:
                progress(taken[-1].nbytes)
        return taken


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    reader = LayoutReader(lambda source: any(source.glob("*.f32")), Numbers)
    monkeypatch.setitem(READERS, "numbers", reader)  # type: ignore[arg-type]
    source = tmp_path / "foreign"
    source.mkdir()
    for rank in range(2):
        tensor = torch.arange(1000, dtype=torch.float32) + rank
        (source / f"{rank}.f32").write_bytes(tensor.numpy().tobytes())
    return source


def test_a_reader_of_another_layout_needs_but_a_row_in_the_table(
    tmp_path: Path, foreign: Path
) -> None:
    done: list[int] = []
    store = Store(tmp_path / "store")
    source = formats.read(foreign)
    manifest = adopt(store, source, progress=done.append)
    assert manifest.id == checkpoint_id(7, "imported")
    assert sum(done) == 2 * source.raw == 2 * manifest.raw
    for rank in range(2):
        found = restore.read(store, store.directory(manifest.id), rank).states["model"]["w"]
        assert torch.equal(found, torch.arange(1000, dtype=torch.float32) + rank)


def test_what_a_reader_finds_damaged_leaves_nothing_behind(tmp_path: Path, foreign: Path) -> None:
    (foreign / "1.f32").write_bytes(torch.tensor([float("nan")]).numpy().tobytes())
    store = Store(tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"1\.f32: expected finite numbers"):
        adopt(store, formats.read(foreign))
    assert not store.root.exists()
