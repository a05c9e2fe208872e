from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume.control.moving import move
from autoglm_resume.errors import RunLocked, UsageError
from autoglm_resume.job.load import load
from autoglm_resume.job.spec import dump
from autoglm_resume.observe import inspection
from autoglm_resume.supervise.base import home, run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory, last_run
from tests.observe.runs import checkpoint, directory, killed_once


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """One that was started here, with a checkpoint."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\nname: demo\n")
    job = load(tmp_path / "job.yaml")
    checkpoint(tmp_path / "runs/demo/checkpoints", 10)
    path = directory(tmp_path / "runs/demo", killed_once().events[:1], **dump(job))
    run_list.add(path, "demo")
    return RunDirectory(path)


def test_all_in_it_is_found_there_and_the_list_follows(run: RunDirectory, tmp_path: Path) -> None:
    before = run_list.read()[0]
    moved = RunDirectory(move(run, tmp_path / "runs/baseline"))
    assert moved.path == tmp_path / "runs/baseline"
    assert not run.path.exists()
    assert home.left(moved) is None, "it is at home there"
    assert moved.job()["checkpoint"]["dir"] == str(moved.path / "checkpoints")
    assert moved.job()["name"] == "baseline", "so that --set name=baseline means it"
    assert moved.job()["script"] == str(tmp_path / "train.py")
    assert len(inspection.find(moved.path).store.committed()) == 1
    (listed,) = run_list.read()
    assert (listed.path, listed.name) == (moved.path, "baseline")
    assert (listed.started, listed.started_from) == (before.started, before.started_from)


def test_it_is_moved_into_a_directory_that_is_no_run(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    moved = move(run, tmp_path / "archive")
    assert moved == tmp_path / "archive/demo"
    assert RunDirectory(moved).job()["name"] == "demo"


def test_checkpoints_that_lie_elsewhere_stay_and_say_whose_they_are(
    run: RunDirectory, tmp_path: Path
) -> None:
    outside = tmp_path / "disk"
    (run.path / "checkpoints").rename(outside)
    run.save_job({**run.job(), "checkpoint": {**run.job()["checkpoint"], "dir": str(outside)}})
    moved = move(run, tmp_path / "moved")
    assert home.checkpoints(RunDirectory(moved)) == outside
    assert last_run(outside) == moved


def test_one_that_trains_stays_where_it_is(run: RunDirectory, tmp_path: Path) -> None:
    with run.locked(), pytest.raises(RunLocked):
        move(run, tmp_path / "moved")
    assert run.exists


@pytest.mark.parametrize("to", ["runs/other", "train.py", "gone/demo", "runs/demo/within"])
def test_it_goes_nowhere_else(run: RunDirectory, tmp_path: Path, to: str) -> None:
    directory(tmp_path / "runs/other", killed_once().events[:1])
    with pytest.raises(UsageError):
        move(run, tmp_path / to)
    assert run.exists
    assert (tmp_path / "train.py").is_file()


def test_links_that_would_lead_nowhere_are_named(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path)
    with pytest.raises(UsageError, match=f"it is a link to the run in {run.path}"):
        move(RunDirectory(tmp_path / "link"), tmp_path / "moved")
    disk = tmp_path / "disk"
    (run.path / "checkpoints").rename(disk)
    (run.path / "checkpoints").symlink_to("../../disk")
    with pytest.raises(UsageError, match="which it would miss elsewhere") as refused:
        move(run, tmp_path / "moved")
    assert f"ln -sfn {disk} {run.path}/checkpoints" in refused.value.hint
    (run.path / "checkpoints").unlink()
    (run.path / "checkpoints").symlink_to(disk)
    assert len(inspection.find(move(run, tmp_path / "moved")).store.committed()) == 1
