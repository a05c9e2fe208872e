from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoglm_resume.cli import target
from autoglm_resume.errors import UsageError
from tests.observe.runs import Script, directory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, of which `old` was active before `new`."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        path = directory(tmp_path / "runs" / name, Script().life().events)
        os.utime(path / "events.jsonl", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path / "runs"


def test_without_a_name_the_newest_run_is_meant(runs: Path) -> None:
    assert target.run(None).path == runs / "new"
    assert [run.path.name for run in target.runs(runs)] == ["new", "old"]


def test_a_run_directory_is_itself(runs: Path) -> None:
    assert target.run("runs/old").path == runs / "old"


def test_a_job_file_means_its_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "old.yaml").write_text("script: train.py\n")
    assert target.run("old.yaml").path == runs / "old"
    assert target.checkpoints("old.yaml") == runs / "old"


def test_a_job_that_was_never_started_is_said_so(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "fresh.yaml").write_text("script: train.py\n")
    with pytest.raises(UsageError, match="never started") as refused:
        target.run("fresh.yaml")
    assert "autoglm run fresh.yaml" in refused.value.hint


@pytest.mark.parametrize("given", ["nothing", "nothing.yaml", "runs/no-run", "runs"])
def test_what_is_no_run_is_refused(runs: Path, given: str) -> None:
    with pytest.raises(UsageError, match=given):
        target.run(given)


def test_without_any_run_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run there") as refused:
        target.run(None)
    assert "autoglm run JOB.yaml" in refused.value.hint


def test_a_directory_of_runs_is_told_from_a_run(runs: Path) -> None:
    assert len(target.runs_in("runs")) == 2
    assert target.runs_in("runs/new") == []
    assert target.runs_in("runs/no-run") == []
    assert target.runs_in(None) == []
