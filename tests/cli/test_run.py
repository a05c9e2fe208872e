"""`autoglm run`: what it takes for a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.in_process import autoglm


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_stands_behind_two_dashes_is_the_scripts(home: Path) -> None:
    (home / "job.yaml").write_text("script: train.py\nargs: [--steps, 5]\n")
    for job, own in (("train.py", []), ("job.yaml", ["--steps", "5"])):
        planned = autoglm("run", job, "--dry-run", "--json", "--", "--json", "--", "-x", "$HOME")
        assert planned.returncode == 0, planned
        command = json.loads(planned.stdout)["command"]
        assert command[-len(own) - 5 :] == [
            *(str(home / "train.py"), *own),
            *("--json", "--", "-x", "$HOME"),
        ]
    wrong = autoglm("run", "train.py", "lost", "--dry-run")
    assert wrong.returncode == 2
    assert "unexpected extra argument" in wrong.stderr


def test_a_run_is_named_by_the_script_that_it_is_of(home: Path) -> None:
    never = autoglm("status", "train.py")
    assert never.returncode == 2
    assert f"this job was never started ({home}/runs/train holds no run)" in never.stderr
    assert "start it with: autoglm run train.py" in never.stderr
