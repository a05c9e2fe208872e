from __future__ import annotations

import io
import os

import pytest

from autoglm_resume.observe import progress
from autoglm_resume.observe.progress import Progress, Waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error, as a terminal. No fixture: pytest puts its own back before a test begins."""
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    return found


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with Progress("x", 100) as step:
        step(100)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("done", "total"), [(0, 0), (50, 100), (200, 100)])
def test_long_work_shows_a_bar_and_removes_it(
    monkeypatch: pytest.MonkeyPatch, done: int, total: int
) -> None:
    stream = terminal(monkeypatch)
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    with Progress("reading", total) as step:
        step(done)
    assert "reading" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K"), "its line is cleared"


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading", 100) as step:
        step(50)
    assert stream.getvalue() == ""


def test_who_waits_sees_a_spinner_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    read, write = os.pipe()
    os.close(write)
    with Waiting("saving") as waiting:
        waiting.now("saving step 7")
        waiting.until(read)
    os.close(read)
    assert "saving step 7" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K"), "its line is cleared"


def test_without_a_terminal_one_line_says_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with Waiting("saving") as waiting:
        waiting.now("saving step 7")
    assert stream.getvalue() == "autoglm: saving\n"
