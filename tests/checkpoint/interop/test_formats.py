from __future__ import annotations

import random
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.fsdp import fully_shard

from autoglm_resume.checkpoint.dcp import Reader, Writer
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.part import pack_file
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.interop import formats
from autoglm_resume.checkpoint.interop.adopt import adopt
from autoglm_resume.checkpoint.interop.bundle import Bundle
from autoglm_resume.checkpoint.interop.gather import gather
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import AutoglmError, CorruptCheckpoint, UsageError
from autoglm_resume.worker.state.parameters import ParameterWatch
from tests.checkpoint.ranks import ranks

OUT = {"safetensors": "out.safetensors", "torch": "out.pt", "dcp": "out"}
ID = checkpoint_id(5, "a0")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
every_kind = pytest.mark.parametrize("kind", list(OUT))


def state(rank: int) -> dict[str, Any]:
    """A model that all ranks have alike, and generators that differ; every type of value."""
    weight = torch.randn(600, 700, generator=torch.Generator().manual_seed(1))
    model = torch.nn.BatchNorm1d(3).state_dict()
    return {
        "model": OrderedDict(model, w=weight, tied=weight, empty=torch.zeros(0, 2)),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}},
            "groups": [(torch.ones(2), 1.5)],
            "odd": {"$x": 1, (1, 2): Counter("aab"), "d": defaultdict(list, a=[2])},
        },
        "rng": {
            "numpy": np.random.RandomState(rank).get_state(),
            "torch": torch.Generator().manual_seed(rank).get_state(),
            "python": random.Random(rank).getstate(),
            "scalar": np.float32(rank),
            "frozen": frozenset([rank]),
        },
        "types": {
            name: torch.ones(3).to(getattr(torch, name))
            for name in ("bfloat16", "float8_e4m3fn", "complex128", "uint32", "bool")
        },
    }


def commit(store: Store, states: list[dict[str, Any]]) -> Path:
    def taken(rank: int) -> Snapshot:
        return capture.take(
            states[rank],
            id=ID,
            rank=rank,
            world_size=len(states),
            model=capture.structure_of(states[rank]["model"]),
            rng=True,
            metrics={"loss": 0.5},
        )

    with ThreadPoolExecutor(len(states)) as pool:
        list(pool.map(lambda rank: PartWriter(store).persist(taken(rank)), range(len(states))))
    return store.directory(ID)


@pytest.fixture(params=[1, 2])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of one rank, and one of two."""
    return commit(Store(tmp_path / "from"), [state(rank) for rank in range(request.param)])


def export(kind: str, source: Path) -> Path:
    out = source.parent.parent / OUT[kind]
    formats.write(kind, out, gather(Store(source.parent), source))
    return out


def back(source: Path, out: Path, step: int | None = None) -> Path:
    """Import what was exported from `source`, and compare the two."""
    store = Store(out.parent / "to")
    manifest = adopt(store, formats.read(out), step)
    path = store.directory(manifest.id)
    original = Store(source.parent).load_manifest(source)
    assert manifest.objects == original.objects
    assert [part.objects for part in manifest.parts] == [p.objects for p in original.parts]
    assert manifest.model_hash == original.model_hash
    assert (manifest.raw, manifest.stored) == (original.raw, original.stored)
    assert (manifest.metrics, manifest.versions) == (original.metrics, original.versions)
    assert (manifest.rng, manifest.data) == (original.rng, original.data)
    assert examine(store, path, deep=True).integrity.ok
    return path


@every_kind
def test_what_is_exported_can_be_imported_byte_by_byte(kind: str, source: Path) -> None:
    out = export(kind, source)
    assert back(source, out).name == checkpoint_id(5, "imported")
    assert back(source, out, step=9).name == checkpoint_id(9, "imported")


def test_safetensors_have_every_tensor_once_under_the_name_of_its_object(source: Path) -> None:
    found = safetensors.torch.load_file(export("safetensors", source))
    expected = state(0)
    assert torch.equal(found["model.w"], expected["model"]["w"])
    assert torch.equal(found["optimizer.state.1.step"], torch.tensor(4.0))
    two = len(Store(source.parent).load_manifest(source).parts) == 2
    assert ("rng.torch" in found) == (not two)
    if two:
        for rank in (0, 1):
            assert torch.equal(found[f"rank{rank}/rng.torch"], state(rank)["rng"]["torch"])


@every_kind
def test_buffers_of_one_model_are_exported_as_rank_zero_has_them(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "from")

    def saved(rank: int) -> Snapshot:
        norm = torch.nn.BatchNorm1d(3)
        norm.running_mean.fill_(rank + 1)  # type: ignore[union-attr]
        known = ParameterWatch({"model": norm}).parameters()
        identity = {"id": ID, "rank": rank, "world_size": 2, "parameters": known}
        return capture.take({"model": norm.state_dict()}, **identity)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: PartWriter(store).persist(saved(rank)), (0, 1)))
    source = store.directory(ID)
    out = export(kind, source)
    back(source, out)
    if kind == "torch":
        assert torch.load(out)["model"]["running_mean"].tolist() == [1, 1, 1]
    if kind == "safetensors":
        found = safetensors.torch.load_file(out)
        assert found["model.running_mean"].tolist() == [1, 1, 1]
        assert found["rank1/model.running_mean"].tolist() == [2, 2, 2]
        assert "model.weight" in found


def test_torch_load_takes_the_states_by_default(source: Path) -> None:
    found = torch.load(export("torch", source))
    torch.nn.BatchNorm1d(3).load_state_dict(
        {k: v for k, v in found["model"].items() if k not in ("w", "tied", "empty")}
    )
    assert found["optimizer"]["state"][1]["step"] == 4
    assert found["optimizer"]["odd"] == {"$x": 1, (1, 2): Counter("aab"), "d": {"a": [2]}}
    rng = found["rng"] if "rng" in found else found["rank0"]["rng"]
    keys = np.random.RandomState(0).get_state()[1]
    assert np.array_equal(rng["numpy"][1].numpy(), keys)
    assert rng["frozen"] == {0}
    assert ("rank1" in found) == ("rank0" in found)
    weight = state(0)["model"]["w"]
    size = (source.parent.parent / OUT["torch"]).stat().st_size
    assert size < 2.1 * weight.numel() * 4  # it is there twice, as it was in the state


def test_dcp_load_takes_the_states(source: Path) -> None:
    out = export("dcp", source)
    into = {"model": {"w": torch.zeros(600, 700)}, "optimizer": {"groups": []}}
    dcp.load(into, storage_reader=dcp.FileSystemReader(out))
    assert torch.equal(into["model"]["w"], state(0)["model"]["w"])
    assert into["optimizer"]["groups"][0][1] == 1.5


@every_kind
def test_nothing_is_overwritten(kind: str, source: Path) -> None:
    out = export(kind, source)
    with pytest.raises(UsageError, match="there already"):
        export(kind, source)
    back(source, out)
    with pytest.raises(UsageError, match="there already"):
        back(source, out)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected one of safetensors, torch, dcp"):
        formats.check("onnx", tmp_path / "out")


@every_kind
def test_a_corrupt_checkpoint_is_not_exported(kind: str, source: Path) -> None:
    pack = source / pack_file(0)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="expected blake3"):
        export(kind, source)
    assert not (source.parent.parent / OUT[kind]).exists()


def test_a_changed_tensor_is_not_imported(source: Path) -> None:
    out = export("safetensors", source)
    content = bytearray(out.read_bytes())
    content[-1000] ^= 1
    out.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="expected blake3"):
        back(source, out)
    assert not list((out.parent / "to").glob("*"))


@pytest.mark.parametrize("length", [0, 4, 100, 5000])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_truncated_file_is_not_imported(kind: str, length: int, source: Path) -> None:
    out = export(kind, source)
    out.write_bytes(out.read_bytes()[:length])
    with pytest.raises(AutoglmError, match="out"):
        formats.read(out)


def garbage(out: Path, what: str) -> None:
    match what:
        case "nothing":
            out.touch()
        case "text":
            out.write_text("hello, this is no checkpoint")
        case "a header":
            out.write_bytes((10**6).to_bytes(8, "little") + b'{"a": 1}')
        case "an archive":
            with zipfile.ZipFile(out, "w") as archive:
                archive.writestr("a", "text")
        case "half an archive":
            out.write_bytes(b"PK" + bytes(1000))
        case "a directory":
            out.mkdir()
            (out / ".metadata").write_bytes(b"garbage")


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("nothing", "an empty file"),
        ("text", "a file that begins with b'hello, this is n'"),
        ("a header", "a safetensors file that cannot be read (Error while deserializing"),
        ("an archive", "an archive that torch.load does not take ("),
        ("half an archive", "an archive that torch.load does not take ("),
        ("a directory", "a directory of DCP that cannot be read ("),
    ],
)
def test_garbage_is_one_line_that_says_what_was_found_and_what_to_do(
    what: str, found: str, tmp_path: Path
) -> None:
    garbage(tmp_path / "out", what)
    with pytest.raises(AutoglmError) as refused:
        formats.read(tmp_path / "out")
    said = refused.value.message
    assert said.startswith(f"{tmp_path / 'out'}: expected what autoglm export writes")
    assert f"found {found}" in said
    assert "\n" not in said
    assert len(said) < 500
    assert "export it again" in refused.value.hint


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_directory_that_lacks_data_is_said_to(damage: str, source: Path) -> None:
    out = export("dcp", source)
    for data in out.glob("*.distcp"):
        if damage == "gone":
            data.unlink()
        else:
            data.write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=r"found a directory of DCP that cannot be read \("):
        formats.read(out)


def test_what_autoglm_has_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        formats.read(tmp_path / "nothing")
    weights = {"w": torch.zeros(2)}
    safetensors.torch.save_file(weights, tmp_path / "a")
    torch.save(weights, tmp_path / "b")
    dcp.save(weights, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    for name in "abc":
        with pytest.raises(UsageError, match="not made by autoglm export"):
            formats.read(tmp_path / name)
    with pytest.raises(UsageError, match=r"found no \.metadata"):
        formats.read(tmp_path)


@pytest.mark.parametrize("change", [{"format": 2}, {"ranks": 3}, {"ranks": [{}]}, {"step": "x"}])
def test_a_document_that_makes_no_sense_is_refused(
    change: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    made = gather(Store(source.parent), source)
    with pytest.raises(AutoglmError):
        adopt(Store(tmp_path / "to"), Bundle({**made.document, **change}, made.tensors))


# What ranks hold together


def sharded(root: Path, save: Callable[[dict[str, Any], int], None]) -> None:
    """A model of FSDP2 over two ranks, and whole.pt beside it."""

    def train(rank: int) -> None:
        torch.manual_seed(1)
        model = torch.nn.Linear(37, 53)
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        whole = {name: t.full_tensor() for name, t in model.state_dict().items()}
        save(model.state_dict(), rank)
        if rank == 0:
            torch.save(whole, root / "whole.pt")

    ranks(root, 2, train)


@every_kind
def test_shards_are_put_together_and_taken_apart_again(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "from")

    def save(model: dict[str, Any], rank: int) -> None:
        taken = capture.take({"model": model}, id=ID, rank=rank, world_size=2)
        PartWriter(store).persist(taken)

    sharded(tmp_path, save)
    source = store.directory(ID)
    out = export(kind, source)
    whole = torch.load(tmp_path / "whole.pt")
    if kind == "safetensors":
        found = safetensors.torch.load_file(out)
        assert set(found) == {"model.weight", "model.bias"}
        assert torch.equal(found["model.weight"], whole["weight"])
    elif kind == "torch":
        found = torch.load(out)
        assert set(found) == {"model", "autoglm"}
        assert torch.equal(found["model"]["weight"], whole["weight"])
    else:
        into = {"model": {"weight": torch.zeros(53, 37)}}
        dcp.load(into, storage_reader=dcp.FileSystemReader(out))
        assert torch.equal(into["model"]["weight"], whole["weight"])
    back(source, out)


@every_kind
def test_what_was_saved_through_dcp_can_leave_and_come_back(kind: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()

    def save(model: dict[str, Any], rank: int) -> None:
        states = {"model": model, "extra": {"lr": [0.1, 0.2], "step": torch.tensor(3.0)}}
        path = tmp_path / "from" / "step-5"
        dcp.save(states, checkpoint_id=path, storage_writer=Writer())

    sharded(tmp_path, save)
    source = tmp_path / "from" / checkpoint_id(5, "dcp")
    out = export(kind, source)
    whole = torch.load(tmp_path / "whole.pt")
    if kind == "safetensors":
        found = safetensors.torch.load_file(out)
        assert torch.equal(found["model.weight"], whole["weight"])
    elif kind == "torch":
        assert torch.equal(torch.load(out)["model.weight"], whole["weight"])
    else:
        rebuilt: dict[str, Any] = {}
        _load_state_dict(
            rebuilt,
            storage_reader=dcp.FileSystemReader(out),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        assert torch.equal(rebuilt["model"]["weight"], whole["weight"])
        assert rebuilt["extra"]["lr"] == [0.1, 0.2]
    imported = back(source, out)
    into = {"model": {"weight": torch.zeros(53, 37)}, "extra": {"lr": []}}
    dcp.load(into, storage_reader=Reader(imported))
    assert torch.equal(into["model"]["weight"], whole["weight"])
    assert into["extra"]["lr"] == [0.1, 0.2]
