from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.cli import target
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.supervise.base import bounded, run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory
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


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`started("jobs/runs/a")`: a run there, below `here`, that was started from `here`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def start(path: str) -> Path:
        made = directory(tmp_path / "here" / path, Script().life().events)
        run_list.add(made, made.name)
        return made

    return start


Started = Callable[[str], Path]


def test_a_run_is_found_where_it_was_started_from_or_lies_and_not_elsewhere(
    started: Started,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = started("jobs/runs/a")
    assert target.run(None).path == run
    assert target.run(None, acts=True).path == run
    assert target.checkpoints(None) == run
    assert capsys.readouterr().err == ("autoglm: the newest run from here: jobs/runs/a\n" * 3)
    for place in (tmp_path, run.parents[2], run):
        monkeypatch.chdir(place)
        assert target.run(None).path == run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no run there") as refused:
        target.run(None)
    assert "autoglm runs" in refused.value.hint


def test_to_look_at_the_newest_is_no_guess_but_to_act_on_it_is(
    started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = started("jobs/runs/a"), started("../far/b").resolve()
    assert target.run(None).path == b
    assert str(b) in capsys.readouterr().err
    assert target.run(None, acts=True).path == b, "the other one is over"
    named = f"not only the newest is running:\n  {b}\n  jobs/runs/a"
    with RunDirectory(a).locked(), pytest.raises(UsageError, match=named) as refused:
        target.run(None, acts=True)
    assert refused.value.exit_code == 2
    with RunDirectory(b).locked():
        assert target.run(None, acts=True).path == b
    shutil.rmtree(b)
    assert target.run(None, acts=True).path == a


def test_of_many_candidates_the_newest_are_named(started: Started) -> None:
    made = [started(f"jobs/runs/{n}") for n in range(target.MOST_NAMED + 2)]
    more = "and 2 more, see: autoglm runs"
    with RunDirectory(made[0]).locked(), pytest.raises(UsageError, match=more):
        target.run(None, acts=True)


def test_the_runs_of_the_directory_itself_come_first(
    started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = started("jobs/runs/a")
    old, new = started("runs/old"), started("runs/new")
    os.utime(old / "events.jsonl", (1000, 1000))
    assert target.run(None).path == new
    assert target.run(None, acts=True).path == new, "as ever"
    assert capsys.readouterr().err == ""
    run_list.add(elsewhere, "a")
    assert target.run(None).path == elsewhere
    assert target.run(None, acts=True).path == elsewhere
    named = "jobs/runs/a\n  runs/new\n  runs/old"
    with RunDirectory(old).locked(), pytest.raises(UsageError, match=named):
        target.run(None, acts=True)
    shutil.rmtree(elsewhere)
    with RunDirectory(old).locked(), pytest.raises(UsageError, match="runs/new\n  runs/old"):
        target.run(None, acts=True)


def test_a_name_that_autoglm_runs_shows_is_a_run(started: Started, tmp_path: Path) -> None:
    run = started("jobs/runs/a")
    assert target.run("a").path == run
    assert target.checkpoints("a") == run
    with pytest.raises(UsageError, match="b: no such run"):
        target.run("b")
    shutil.rmtree(run)
    with pytest.raises(UsageError, match="a: no such run"):
        target.run("a")


def test_of_several_of_one_name_the_one_from_here_is_meant_and_no_other_is_guessed(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = started("../far/runs/a").resolve()
    near = started("jobs/runs/a")
    monkeypatch.chdir(tmp_path / "here" / "jobs")
    assert target.run("a").path == near
    monkeypatch.chdir(tmp_path / "state")
    with pytest.raises(UsageError, match=f"called a:\n  {near}\n  {far}"):
        target.run("a")


def test_what_is_to_be_pasted_is_short_and_quoted(tmp_path: Path) -> None:
    assert target.shown(RunDirectory(Path.cwd() / "my runs" / "a")) == "'my runs/a'"
    assert target.shown(RunDirectory(tmp_path / "a")) == str(tmp_path / "a")


def test_a_link_in_place_of_runs_makes_no_run_two(started: Started, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    Path("runs").symlink_to(tmp_path / "scratch")
    run = started("runs/a")
    assert target.run(None, acts=True).path == run


def test_a_run_that_does_not_answer_is_not_passed_over(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    started("jobs/runs/a")
    started("jobs/runs/b")
    monkeypatch.setattr(bounded, "ask", lambda question, about: {1: True})
    with pytest.raises(AutoglmError, match="jobs/runs/b: no answer within 2 s"):
        target.run(None)
