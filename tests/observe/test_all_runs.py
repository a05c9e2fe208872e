from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from autoglm_resume import journal
from autoglm_resume.observe import all_runs
from autoglm_resume.supervise.base import run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import Script, directory, killed_once


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def started(path: Path, script: Script) -> Path:
    """A run that is on the list."""
    directory(path, script.events)
    run_list.add(path, path.name)
    return path


def seen() -> dict[str, tuple[str, int | None]]:
    return {one.run.name: (one.state, one.step) for one in all_runs.look()}


def test_runs_are_seen_wherever_they_lie_the_last_started_first(tmp_path: Path) -> None:
    started(tmp_path / "a" / "finished", killed_once())
    interrupted = Script().life().attempt(0).save(0, 57).say("run_interrupted", code=75, step=57)
    started(tmp_path / "b" / "interrupted", interrupted)
    started(tmp_path / "c" / "dead", Script().life().attempt(0).both("first_step", step=9))
    uncounted = Script().life().say("attempt_started", attempt=0, step=0)
    started(tmp_path / "uncounted", uncounted.say("run_completed", step=-1))
    assert list(seen().items()) == [
        ("uncounted", ("finished", None)),
        ("dead", ("dead", 9)),
        ("interrupted", ("interrupted", 57)),
        ("finished", ("finished", 10)),
    ]


def test_a_run_that_is_held_is_alive(tmp_path: Path) -> None:
    path = started(tmp_path / "demo", Script().life().attempt(0).both("first_step", step=9))
    with RunDirectory(path).locked():
        assert seen() == {"demo": ("training", 9)}
    assert seen() == {"demo": ("dead", 9)}


def test_a_run_whose_directory_is_gone_leaves_the_list(tmp_path: Path) -> None:
    gone = started(tmp_path / "gone", killed_once())
    started(tmp_path / "there", killed_once())
    shutil.rmtree(gone)
    assert list(seen()) == ["there"]
    assert [run.name for run in run_list.read()] == ["there"]


def test_a_run_that_does_not_answer_or_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe in place of its journal hangs whoever opens it plainly, as a dead mount does all."""
    monkeypatch.setattr("autoglm_resume.files.reading", lambda path: path.open("rb"))
    silent = started(tmp_path / "silent", killed_once())
    (silent / "events.jsonl").unlink()
    os.mkfifo(silent / "events.jsonl")
    unreadable = started(tmp_path / "unreadable", killed_once())
    (unreadable / "events.jsonl").unlink()
    (unreadable / "events.jsonl").mkdir()
    started(tmp_path / "sound", killed_once())
    assert seen() == {
        "sound": ("finished", 10),
        "unreadable": ("unreadable", None),
        "silent": ("no answer", None),
    }
    assert len(run_list.read()) == 3, "it may answer again"


def test_a_name_that_is_no_text_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path / "sound", killed_once())
    started(tmp_path / os.fsdecode(b"odd-\xff-\x1b[31m"), killed_once())
    with (tmp_path / "shown").open("w", encoding="utf-8", errors="strict") as out:
        monkeypatch.setattr("sys.stdout", out)
        all_runs.show(all_runs.look())
    _, odd, sound = (tmp_path / "shown").read_text("utf-8").splitlines()
    assert odd.startswith("odd-\N{REPLACEMENT CHARACTER}-  ")
    assert sound.endswith(f"  {tmp_path / 'sound'}")


def test_of_a_long_journal_the_end_is_enough(tmp_path: Path) -> None:
    script = Script().life().attempt(0)
    for step in range(0, 20_000, 10):
        script.at(step).save(0, step)
    path = started(tmp_path / "demo", script)
    assert (path / "events.jsonl").stat().st_size > 2 * all_runs.END
    events, whole = journal.read_end(path / "events.jsonl", all_runs.END)
    assert not whole
    assert 0 < len(events) < len(script.events) / 2
    with RunDirectory(path).locked():
        assert seen() == {"demo": ("training", 19_990)}
    assert seen() == {"demo": ("dead", 19_990)}
    directory(path, script.say("run_completed", step=20_000).events)
    assert seen() == {"demo": ("finished", 20_000)}
