"""`autoglm runs` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoglm_resume.supervise.base import run_list
from tests.cli.test_app import autoglm
from tests.observe.runs import directory, killed_once


def test_runs_lists_what_was_started_as_a_table_or_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    none = autoglm("runs", cwd=tmp_path)
    assert (none.returncode, none.stdout) == (0, "")
    assert "autoglm run JOB.yaml" in none.stderr
    assert autoglm("runs", "--json", cwd=tmp_path).stdout == "[]\n"
    run = directory(tmp_path / "demo", killed_once().events)
    run_list.add(run, "demo")
    head, line = autoglm("runs", cwd=tmp_path).stdout.splitlines()
    assert head.split() == ["run", "state", "step", "started", "directory"]
    assert line.split()[:3] == ["demo", "finished", "10"]
    assert line.endswith(f"  {run}")
    (found,) = json.loads(autoglm("runs", "--json", cwd=tmp_path).stdout)
    assert (found["name"], found["step"], found["run"]) == ("demo", 10, str(run))
