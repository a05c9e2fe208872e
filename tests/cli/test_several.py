from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from autoglm_resume import output
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.cli import several
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.cli.in_process import autoglm
from tests.control.test_stopping import held
from tests.observe.runs import Script, checkpoint, directory
from tests.patience import PATIENCE


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, of which none lives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for age, name in enumerate(("new", "old", "older")):
        path = directory(tmp_path / "runs" / name, Script().life().events)
        os.utime(path / "events.jsonl", (1000 - age, 1000 - age))
    return tmp_path / "runs"


@pytest.fixture
def alive(runs: Path) -> Iterator[list[str]]:
    """`old` and `older` live: a lock belongs to who opened the file, so this process has them."""
    with ExitStack() as locks:
        for name in ("old", "older"):
            locks.enter_context(RunDirectory(runs / name).locked())
        yield ["old", "older"]


def living(*given: str, sure: bool = False) -> list[str]:
    return [run.path.name for run in several.living(given, "stop", sure=sure)]


def test_unnamed_the_only_run_that_lives_is_meant(runs: Path) -> None:
    assert living() == ["new"], "which says that it does not run"
    with RunDirectory(runs / "older").locked():
        assert living() == ["older"]


@pytest.mark.usefixtures("alive")
def test_between_two_that_live_there_is_no_guess() -> None:
    with pytest.raises(UsageError, match="all of them running:\n  runs/old\n  runs/older"):
        living()
    for command in ("stop", "save"):
        refused = autoglm(command)
        assert refused.returncode == 2
        assert "runs/older" in refused.stderr


@pytest.mark.usefixtures("runs")
def test_several_may_be_named_and_each_counts_once() -> None:
    assert living("runs/old", "new", "old") == ["old", "new"]


@pytest.mark.usefixtures("alive")
def test_a_directory_means_those_in_it_that_live_after_a_yes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert living("runs", sure=True) == ["old", "older"]
    asked = []
    for answer in (True, False):
        monkeypatch.setattr(output, "ask", lambda text, says=answer: asked.append(text) or says)
        if answer:
            assert living("runs") == ["old", "older"]
        else:
            with pytest.raises(AutoglmError, match="nothing was done"):
                living("runs")
    assert asked[0].splitlines()[1:] == ["  runs/old", "  runs/older", "stop 2 runs?"]


@pytest.mark.usefixtures("alive")
def test_without_a_terminal_a_directory_is_refused_with_what_to_type() -> None:
    refused = autoglm("stop", "runs")
    assert refused.returncode == 2
    assert "  runs/old\n  runs/older\n" in refused.stderr
    assert "autoglm stop runs --yes" in refused.stderr


@pytest.mark.usefixtures("runs")
def test_a_directory_in_which_none_lives_is_stopped_but_not_saved() -> None:
    assert autoglm("stop", "runs").returncode == 0
    saved = autoglm("save", "runs")
    assert saved.returncode == 1
    assert "none of its 3 runs is running" in saved.stderr


def test_all_are_asked_before_any_is_waited_for_and_one_that_fails_hinders_none(
    runs: Path,
) -> None:
    processes = [held(runs / name) for name in ("new", "old")]
    with RunDirectory(runs / "older").locked() as lock:
        lock.describe("")
        text = (runs / "older" / "lock").read_text()
        (runs / "older" / "lock").write_text(text.replace(os.uname().nodename, "far"))
        stopped = autoglm("stop", "runs/older", "runs", "--yes")
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 75, signal.Signals
    assert stopped.returncode == 2
    assert f"autoglm stop {runs / 'older'}" in stopped.stderr
    assert [line.split(":")[0] for line in stopped.stdout.splitlines()] == [
        str(runs / "new"),
        str(runs / "old"),
    ]


def test_prune_takes_several_and_leaves_those_that_train_alone(runs: Path) -> None:
    for name in ("new", "old"):
        for step in (10, 20):
            checkpoint(runs / name / "checkpoints", step)
    left = {name: Store(runs / name / "checkpoints").committed for name in ("new", "old")}
    assert autoglm("prune", "runs", "--keep", "1").returncode == 2
    assert autoglm("prune", "runs", "--keep", "1", "--dry-run").returncode == 0
    assert [len(committed()) for committed in left.values()] == [2, 2]
    with RunDirectory(runs / "old").locked():
        refused = autoglm("prune", "--keep", "1")
        assert refused.returncode == 2, "unnamed, while another one lives"
        assert autoglm("prune", "runs", "--yes", "--keep", "1").returncode == 76
    assert [len(committed()) for committed in left.values()] == [1, 2]
    assert autoglm("prune", "new", "old", "--keep", "1").returncode == 0
    assert [len(committed()) for committed in left.values()] == [1, 1]
