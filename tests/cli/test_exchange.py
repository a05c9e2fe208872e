"""`autoglm export` and `autoglm import` as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from tests.cli.in_process import autoglm
from tests.observe.runs import checkpoint, directory, killed_once

ID = checkpoint_id(20, "a0")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_a_checkpoint_leaves_and_comes_back(kind: str, tmp_path: Path) -> None:
    root, out, there = tmp_path / "checkpoints", tmp_path / "out", tmp_path / "there"
    checkpoint(root, 20)
    done = autoglm("export", root, out, "--to", kind)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"{out}: step-0000000020")
    done = autoglm("import", out, there, "--step", "30")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path = there / "step-0000000030.imported"
    assert done.stdout.startswith(f"{path}: ")
    made, original = Store(there).load_manifest(path), Store(root).latest()
    assert original is not None
    assert made.objects == Store(root).load_manifest(original).objects


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_one_object_alone_is_a_plain_state_with_the_usual_mode(kind: str, tmp_path: Path) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "out"
    checkpoint(root, 20)
    usual = tmp_path / "usual"
    usual.touch()
    done = autoglm("export", root, out, "--to", kind, "--only", "model")
    assert done.returncode == 0, done.stderr
    expected = {"weight": torch.full((8, 8), 20.0), "bias": torch.zeros(8)}
    if kind == "dcp":
        found = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
        dcp.load(found, storage_reader=dcp.FileSystemReader(out), no_dist=True)
    else:
        found = safetensors.torch.load_file(out) if kind == "safetensors" else torch.load(out)
        assert out.stat().st_mode == usual.stat().st_mode
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_there_already_not_there_or_not_ours_is_refused(tmp_path: Path) -> None:
    root, whole, model = tmp_path / "checkpoints", tmp_path / "whole.pt", tmp_path / "model.pt"
    checkpoint(root, 20)
    for out, more in ((whole, ()), (model, ("--only", "model"))):
        assert autoglm("export", root, out, "--to", "torch", *more).returncode == 0
    assert autoglm("import", whole, tmp_path / "there").returncode == 0
    for words, message in (
        (("import", whole, tmp_path / "there"), "there already"),
        (("import", model, tmp_path / "there"), "not made by autoglm export"),
        (
            ("export", root, tmp_path / "none", "--to", "dcp", "--only", "modle"),
            "no object 'modle'; there are model, optimizer",
        ),
    ):
        done = autoglm(*words)
        assert done.returncode == 2
        assert message in done.stderr


def test_an_object_that_ranks_have_differently_is_not_taken_from_one_of_them(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "checkpoints")
    for rank in (0, 1):
        state = {"model": {"w": torch.full((3,), float(rank))}}
        taken = capture.take(state, id=ID, rank=rank, world_size=2)
        PartWriter(store, share=False).persist(taken)
    done = autoglm("export", store.root, tmp_path / "out", "--to", "torch", "--only", "model")
    assert done.returncode == 2
    assert "expected one for all ranks, found another in each of rank0, rank1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_import_lands_where_the_run_looks(tmp_path: Path) -> None:
    """Also where the run is still to come, as a job file beside the runs or a habit says."""
    root, out = tmp_path / "checkpoints", tmp_path / "out"
    checkpoint(root, 20)
    assert autoglm("export", root, out, "--to", "torch").returncode == 0
    (tmp_path / "train.py").touch()
    (tmp_path / "broken.yaml").write_text("scirpt: train.py\n")
    (tmp_path / "job.yaml").write_text("script: train.py\nname: named\ncheckpoint: {dir: disk}\n")
    (tmp_path / "other.yaml").write_text("script: train.py\nrun_dir: elsewhere/run\n")
    started = directory(tmp_path / "runs" / "started", killed_once().events)
    for given, where in (
        (tmp_path / "runs" / "named", "disk"),
        (tmp_path / "runs" / "nobodys", "runs/nobodys/checkpoints"),
        (tmp_path / "other.yaml", "elsewhere/run/checkpoints"),
        (started, "runs/started/checkpoints"),
        (tmp_path / "backup", "backup"),
    ):
        done = autoglm("import", out, given)
        assert done.returncode == 0, done.stderr
        path = tmp_path / where / "step-0000000020.imported"
        assert done.stdout.startswith(f"{path}: ")
        assert Store(path.parent).committed() == [path]
    plan = autoglm("run", tmp_path / "job.yaml", "--set", "nproc_per_node=2", "--dry-run")
    assert "it would start from step 20, checkpoint step-0000000020.imported" in plan.stdout


def test_mistakes_are_said_before_anything_is_read(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    checkpoint(root, 20)
    (tmp_path / "taken").write_text("")
    for arguments, message in (
        (["export", root, tmp_path / "out", "--to", "onnx"], "expected one of safetensors"),
        (["export", root, tmp_path / "taken", "--to", "torch"], "there already"),
        (["export", tmp_path / "none", tmp_path / "out", "--to", "torch"], "no such file"),
        (["import", tmp_path / "none", tmp_path / "to"], "no such file"),
        (["import", tmp_path / "taken", tmp_path / "to"], "found an empty file"),
    ):
        done = autoglm(*arguments)
        assert done.returncode in (2, 90)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
