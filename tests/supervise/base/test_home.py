"""Run directories that were moved, copied, linked or set aside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.errors import UsageError
from autoglm_resume.events import RunStarted
from autoglm_resume.observe import inspection
from autoglm_resume.protocol.relocation import relocated
from autoglm_resume.supervise.base import home
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.worker import run_beside
from tests.observe.runs import checkpoint, directory, killed_once

parts = st.lists(st.sampled_from(["a", "b", "runs"]), min_size=1, max_size=3)


@given(before=parts, now=parts, within=parts)
def test_what_lay_in_a_run_lies_in_it_wherever_it_is(
    before: list[str], now: list[str], within: list[str]
) -> None:
    was, is_, elsewhere = Path("/old", *before), Path("/new", *now), Path("/else", *within)
    job = {
        "run_dir": str(was),
        "workdir": str(elsewhere),
        "checkpoint": {
            "dir": str(was.joinpath(*within)),
            "replicas": [str(elsewhere), "s3://a/b", str(was / "r")],
            "keep": {"last": 3},
        },
        "args": [str(was)],
    }
    assert relocated(job, is_) == {
        "run_dir": str(is_),
        "workdir": str(elsewhere),
        "checkpoint": {
            "dir": str(is_.joinpath(*within)),
            "replicas": [str(elsewhere), "s3://a/b", str(is_ / "r")],
            "keep": {"last": 3},
        },
        "args": [str(was)],
    }
    assert relocated(job, was) == job


@pytest.mark.parametrize("job", [{}, {"run_dir": 3}, {"run_dir": ""}, {"checkpoint": "x"}])
def test_a_job_that_says_nothing_of_its_home_is_as_it_is(job: dict[str, object]) -> None:
    assert relocated(job, Path("/now")) == job


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begun(tmp_path / "runs" / "job", "checkpoints")


def begun(path: Path, checkpoints: str | Path, id: str = "r1") -> Path:
    """A run with two checkpoints, its `checkpoints` in it or elsewhere."""
    where = path / checkpoints
    for step in (10, 20):
        checkpoint(where, step, ranks=1)
    told = [e.but(run_id=id) if isinstance(e, RunStarted) else e for e in killed_once().events]
    return directory(path, told, run_dir=str(path), checkpoint={"dir": str(where)})


def test_checkpoints_deep_in_a_run_are_known_to_be_its_own(tmp_path: Path) -> None:
    path = begun(tmp_path / "job", "a/b")
    for given_ in (path, path / "a" / "b", path / "a" / "b" / "step-0000000020.a0"):
        found = inspection.find(given_)
        assert found.run is not None
        assert found.run.path == path


def test_a_link_to_the_checkpoints_of_a_run_means_that_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run / "checkpoints")
    found = inspection.find(tmp_path / "link")
    assert found.run is not None
    assert found.run.path == run


def test_a_linked_run_is_the_run(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run)
    assert home.left(RunDirectory(link)) is None
    assert inspection.find(link).store.root == run / "checkpoints"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_copy_and_a_moved_run_have_the_checkpoints_in_them(
    run: Path, tmp_path: Path, how: str
) -> None:
    other = tmp_path / "backup" / "other"
    if how == "moved":
        other.parent.mkdir()
        run.rename(other)
    else:
        shutil.copytree(run, other)
    found = inspection.find(other)
    assert found.store.root == other / "checkpoints"
    assert [path.parent.parent for path in found.paths] == [other] * 2
    within = inspection.find(other / "checkpoints")
    assert within.run is not None
    assert within.run.path == other
    assert run_beside.find(other / "checkpoints").id == "r1", "a script alone knows it, too"


def test_a_moved_run_goes_on_and_a_copy_does_not(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    with pytest.raises(UsageError, match=f"a copy of the run in {run}, which is still there"):
        home.left(RunDirectory(other))
    shutil.rmtree(run)
    assert home.left(RunDirectory(other)) == run


def test_a_run_that_was_set_aside_is_another_than_the_one_in_its_place(run: Path) -> None:
    aside = run.rename(run.with_name("job~1"))
    begun(run, "checkpoints", "r2")
    assert home.left(RunDirectory(aside)) == run
    assert inspection.find(aside).store.root == aside / "checkpoints"


def test_a_copy_without_its_checkpoints_vouches_for_nobody_elses(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    run = begun(tmp_path / "runs" / "job", outside)
    other = tmp_path / "backup"
    shutil.copytree(run, other)
    with pytest.raises(UsageError, match="it holds no checkpoints") as caught:
        inspection.find(other)
    assert str(run) in caught.value.message
    shutil.rmtree(run)
    assert inspection.find(other).store.root == outside, "the run was moved, its checkpoints not"


@pytest.mark.parametrize("job", ["[]", "{", '{"checkpoint": "x", "run_dir": 4}'])
def test_somebody_elses_job_above_checkpoints_is_none(tmp_path: Path, job: str) -> None:
    (tmp_path / "job.json").write_text(job)
    checkpoint(tmp_path / "mine", 10, ranks=1)
    assert inspection.find(tmp_path / "mine").run is None
