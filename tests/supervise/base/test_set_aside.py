"""Starting over: only what is ours is renamed, and nothing is copied or deleted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import RunLocked, UsageError
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.observe import inspection
from autoglm_resume.supervise.base import home
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.set_aside import start_over
from tests.observe.runs import checkpoint, directory, killed_once


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with checkpoints of its own, one of them in quarantine."""
    path = tmp_path / "runs" / "job"
    fill(path / "checkpoints")
    directory(path, killed_once().events, run_dir=str(path))
    return RunDirectory(path)


def fill(checkpoints: Path) -> None:
    for step in (10, 20, 30):
        checkpoint(checkpoints, step, ranks=1)
    Store(checkpoints).quarantine(checkpoint_id(20, "a0"), "a test")


def elsewhere(run: RunDirectory, checkpoints: Path) -> Path:
    """The same run, with its checkpoints there."""
    run.save_job({**run.recorded_job(), "checkpoint": {"dir": str(checkpoints)}})
    return checkpoints


def steps(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir() if path.name.startswith("step-"))


SAVED = [checkpoint_id(10, "a0"), checkpoint_id(30, "a0")]


def test_a_run_is_renamed_with_all_that_is_in_it(run: RunDirectory) -> None:
    (run.path / "my-plots").mkdir()
    (said,) = start_over(run, run.path / "checkpoints", [])
    aside = run.path.with_name("job~1")
    assert str(aside) in said
    assert not run.path.exists()
    assert (aside / "my-plots").is_dir()
    found = inspection.find(aside)
    assert found.store.root == aside / "checkpoints"
    assert steps(found.store.root) == SAVED
    directory(run.path, [])
    start_over(run, run.path / "checkpoints", [])
    assert run.path.with_name("job~2").is_dir()


def test_where_no_run_was_begun_nothing_is_moved(tmp_path: Path) -> None:
    (tmp_path / "runs" / "job").mkdir(parents=True)
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "notes.txt").touch()
    assert start_over(RunDirectory(tmp_path / "runs" / "job"), tmp_path / "ckpts", []) == []
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["notes.txt"]


def test_in_a_directory_of_checkpoints_only_ours_are_set_aside(
    run: RunDirectory, tmp_path: Path
) -> None:
    project = elsewhere(run, tmp_path)
    fill(project)
    (project / "train.py").touch()
    (project / "step-by-step.md").touch()
    said = start_over(run, project, [])
    aside = project / "set-aside~1"
    assert str(aside) in said[0]
    assert steps(project) == ["step-by-step.md"]
    assert (project / "train.py").exists()
    assert steps(aside) == SAVED
    assert (aside / "quarantine").is_dir()
    old = RunDirectory(run.path.with_name("job~1"))
    assert home.checkpoints(old) == aside, "the run that was set aside knows where they are"


def test_a_link_to_checkpoints_stays_and_leads_where_it_led(
    run: RunDirectory, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    fill(big)
    link = elsewhere(run, tmp_path / "ckpts")
    link.symlink_to(big)
    start_over(run, link, [])
    assert link.readlink() == big
    assert steps(link) == []
    assert steps(big / "set-aside~1") == SAVED


def test_a_mounted_volume_keeps_what_is_in_it(run: RunDirectory, small_disk: Path) -> None:
    fill(small_disk)
    (small_disk / "somebody-elses").touch()
    start_over(run, elsewhere(run, small_disk), [])
    assert steps(small_disk / "set-aside~1") == SAVED
    assert (small_disk / "somebody-elses").exists()
    assert os.path.ismount(small_disk)


def test_a_link_to_a_run_stays_and_leads_to_the_new_one(run: RunDirectory, tmp_path: Path) -> None:
    big = tmp_path / "big"
    run.path.rename(big)
    run.path.symlink_to(big)
    start_over(run, run.path / "checkpoints", [])
    assert run.path.resolve() == big
    assert list(big.iterdir()) == []
    assert steps(tmp_path / "big~1" / "checkpoints") == SAVED


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("mount is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("bound", [False, True], ids=["mounted", "bound"])
def test_a_run_directory_that_is_a_mount_point_is_refused(
    run: RunDirectory, small_disk: Path, bound: bool
) -> None:
    path = small_disk
    if bound:
        path = small_disk.with_name("bound")
        path.mkdir()
        subprocess.run(["mount", "--bind", str(run.path), str(path)], check=True)
    directory(path, [])
    try:
        refused(RunDirectory(path), path / "checkpoints", "it is a mount point")
    finally:
        if bound:
            subprocess.run(["umount", str(path)], check=True)


def refused(run: RunDirectory, checkpoints: Path, why: str, *needed: Path) -> None:
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        start_over(run, checkpoints, needed)
    assert why in caught.value.message
    assert sorted(run.path.rglob("*")) == before, "nothing was changed"


def test_a_run_directory_that_is_the_project_is_refused(run: RunDirectory) -> None:
    script = run.path / "src" / "train.py"
    script.parent.mkdir()
    script.touch()
    refused(run, run.path / "checkpoints", f"it is also where {script} lies", script)


def test_a_link_within_a_run_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    fill(tmp_path / "big")
    link = elsewhere(run, run.path / "linked")
    link.symlink_to(tmp_path / "big")
    refused(run, link, "it is a link or a mount point in the run's directory")


def locked_run(run: RunDirectory, outside: Path) -> object:
    return run.locked()


def locked_directory(run: RunDirectory, outside: Path) -> object:
    return locked_checkpoints(outside)


@pytest.mark.parametrize("lock", [locked_run, locked_directory])
def test_what_another_supervisor_has_is_left_alone(
    run: RunDirectory, tmp_path: Path, lock: Callable[[RunDirectory, Path], object]
) -> None:
    outside = elsewhere(run, tmp_path / "outside")
    fill(outside)
    with lock(run, outside), pytest.raises(RunLocked):  # type: ignore[attr-defined]
        start_over(run, outside, [])
    assert run.exists
