from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoglm_resume.supervise.base import bounded


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """Whoever opens it to read waits for ever, as on a mount that is dead."""
    os.mkfifo(tmp_path / "silent")
    return tmp_path / "silent"


def test_what_does_not_answer_hides_nothing_that_does(silent: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("yes")
    asked = [silent, tmp_path / "there", tmp_path / "missing", silent]
    assert bounded.ask(Path.read_text, asked, patience=1.0) == {1: "yes"}


def test_nothing_waits_where_all_have_answered() -> None:
    assert bounded.ask(lambda n: [n, None], range(100), patience=600) == {
        n: [n, None] for n in range(100)
    }
    assert bounded.ask(len, []) == {}


def test_long_answers_come_whole() -> None:
    assert bounded.ask(lambda n: "x" * n, [1, 1 << 20]) == {0: "x", 1: "x" * (1 << 20)}


def test_the_child_that_may_hang_keeps_nothing_of_its_parent_open(tmp_path: Path) -> None:
    """Not the end of a pipe that somebody reads to its end, nor a lock."""
    with (tmp_path / "lock").open("w"):
        pid, names = bounded.ask(
            lambda path: [os.getpid(), [each.name for each in path.iterdir()]],
            [Path("/proc/self/fd")],
        )[0]
    assert pid != os.getpid()
    assert len(names) == 2, "that of the answers, and that of the directory just listed"
