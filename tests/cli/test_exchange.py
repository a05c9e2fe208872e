"""`autoglm export` and `autoglm import` as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.store import Store
from tests.cli.test_app import autoglm
from tests.observe.runs import checkpoint


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
    again = autoglm("import", out, there, "--step", "30")
    assert again.returncode == 2
    assert "there already" in again.stderr
    assert "import it as another --step" in again.stderr


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
