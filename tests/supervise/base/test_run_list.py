from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from autoglm_resume import files
from autoglm_resume.supervise.base import run_list
from tests.patience import PATIENCE

ADD = """
import sys
from pathlib import Path
from autoglm_resume.supervise.base import run_list
for path in sys.argv[1:]:
    run_list.add(Path(path), "a run")
print("done")
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's list will be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "autoglm" / "runs"


def begin(path: Path, name: str = "demo") -> Path:
    path.mkdir(parents=True)
    run_list.add(path, name)
    return path


def paths() -> list[Path]:
    return [run.path for run in run_list.read()]


def test_the_last_started_is_the_first_of_the_list(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = begin(tmp_path / "a"), begin(tmp_path / "b")
    assert paths() == [b, a]
    run_list.add(a, "demo")
    assert paths() == [a, b], "started again, it is the same run"
    assert run_list.read()[0].started_from == tmp_path
    assert run_list.read()[0].name == "demo"


def test_a_run_is_of_where_it_was_started_and_of_where_it_lies(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "jobs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "jobs")
    begin(tmp_path / "scratch" / "a")
    (run,) = run_list.read()
    assert run.is_of(tmp_path / "project")
    assert run.is_of(tmp_path / "project" / "jobs")
    assert run.is_of(tmp_path / "scratch")
    assert not run.is_of(tmp_path / "project" / "other")
    assert not run.is_of(tmp_path / "proj")


def test_a_link_to_a_run_is_no_second_run(state: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    run_list.add(tmp_path / "link", "demo")
    assert paths() == [run]


def test_two_supervisors_at_once_are_both_on_the_list(state: Path, tmp_path: Path) -> None:
    runs = [tmp_path / f"run-{n}" for n in range(40)]
    halves = (runs[:20], runs[20:])
    both = [subprocess.Popen([sys.executable, "-c", ADD, *map(str, half)]) for half in halves]
    assert [process.wait(PATIENCE) for process in both] == [0, 0]
    assert sorted(paths()) == sorted(runs)


def test_a_supervisor_that_is_killed_while_it_registers_leaves_a_sound_list(
    state: Path, tmp_path: Path
) -> None:
    runs = [str(tmp_path / f"run-{n}") for n in range(500)]
    process = subprocess.Popen([sys.executable, "-c", ADD, *runs])
    # One of them may be the temporary name of a file that is being written.
    while not state.is_dir() or len(os.listdir(state)) < 21:  # noqa: PTH208
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    sound = [name for name in state.iterdir() if not name.name.startswith(files.TEMPORARY)]
    assert 20 <= len(paths()) <= len(sound) + 1
    assert begin(tmp_path / "later") in paths()


def test_what_a_killed_write_left_behind_is_swept_away_later(state: Path, tmp_path: Path) -> None:
    begin(tmp_path / "a")
    for age, name in enumerate(("old", "new")):
        (state / f"{files.TEMPORARY}{name}").write_text("{")
        os.utime(state / f"{files.TEMPORARY}{name}", (2e9 * age, 2e9 * age))
    begin(tmp_path / "b")
    assert not (state / f"{files.TEMPORARY}old").exists()
    assert (state / f"{files.TEMPORARY}new").exists(), "somebody may be writing it"


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\x00\xff",
        b"[]",
        b"[" * 100_000,
        b'{"path": 3, "name": "x", "started_from": "/", "started": 1}',
        b'{"path": "/x\\u0000", "name": "x", "started_from": "/", "started": 1}',
        b'{"path": "relative", "name": "x", "started_from": "/", "started": 1}',
        b'{"path": "/x", "name": "x", "started_from": "/", "started": NaN}',
        b'{"path": "/x", "name": "x", "started_from": "/", "started": "yesterday"}',
    ],
)
def test_a_damaged_line_hides_no_other(state: Path, tmp_path: Path, damaged: bytes) -> None:
    run = begin(tmp_path / "a")
    (state / ("0" * 32 + ".json")).write_bytes(damaged)
    (state / "of another program").write_bytes(damaged)
    assert paths() == [run]


def test_a_field_of_a_newer_version_is_passed_over(state: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "a")
    (file,) = state.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "new": [1]}))
    assert paths() == [run]


def test_what_is_gone_leaves_the_list_unless_it_was_started_again(
    state: Path, tmp_path: Path
) -> None:
    run = begin(tmp_path / "a")
    (before,) = run_list.read()
    run_list.add(run, "demo")
    run_list.forget(before)
    assert paths() == [run]
    run_list.forget(run_list.read()[0])
    run_list.forget(before)
    assert paths() == []


@pytest.mark.parametrize(
    "environment",
    [
        {"XDG_STATE_HOME": ""},
        {"XDG_STATE_HOME": "relative"},
        {"XDG_STATE_HOME": "/proc/nothing"},
        {"XDG_STATE_HOME": "", "HOME": "/dev/null"},
        {"XDG_STATE_HOME": "", "HOME": "relative"},
    ],
)
def test_without_a_place_for_it_no_start_fails(tmp_path: Path, environment: dict[str, str]) -> None:
    """HOME is somewhere below tmp_path, if it is not of the case: nothing goes to the real one."""
    ended = subprocess.run(
        [sys.executable, "-c", ADD + "print(run_list.read()[:0])", str(tmp_path / "a")],
        env={**os.environ, "HOME": str(tmp_path / "home"), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n[]\n", "")
    assert not (tmp_path / "relative").exists()


def test_home_is_where_the_list_is_unless_the_environment_names_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_list.directory() == tmp_path / ".local" / "state" / "autoglm" / "runs"
    monkeypatch.delenv("HOME")
    found = run_list.directory()
    assert found is None or found.is_absolute()


def test_on_a_read_only_file_system_nothing_is_said(
    state: Path, tmp_path: Path, read_only: Callable[[Path], Callable[[], None]]
) -> None:
    run = begin(tmp_path / "a")
    undo = read_only(state)
    begin(tmp_path / "b")
    run_list.forget(run_list.read()[0])
    assert paths() == [run]
    undo()


def test_on_a_full_disk_the_list_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64)
    monkeypatch.setenv("XDG_STATE_HOME", str(disk))
    run = begin(tmp_path / "a")
    with suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    begin(tmp_path / "b")
    assert paths() == [run]


def test_a_home_that_does_not_answer_holds_up_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe in its place hangs whoever opens it, as a dead mount does."""
    monkeypatch.setattr(run_list, "_write", lambda file, found: file.read_text())
    monkeypatch.setattr(run_list, "_file", lambda where, run: tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    begin(tmp_path / "a")
