from __future__ import annotations

import io

import pytest

from autoglm_resume.observe import progress
from autoglm_resume.observe.progress import Progress, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_tells_share_speed_and_rest() -> None:
    line = bar("verifying", 1 << 30, 4 << 30, 2.0)
    assert "25% of 4.0 GiB, 512.0 MiB/s, 6.00 s left" in line


@pytest.mark.parametrize(("done", "total"), [(0, 0), (0, 10), (20, 10)])
def test_a_bar_never_fails(done: int, total: int) -> None:
    assert bar("x", done, total, 0.0)


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("x", 100) as step:
        step(100)
    assert stream.getvalue() == ""


def test_long_work_shows_a_bar_and_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading", 100) as step:
        step(50)
    assert "reading" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading", 100) as step:
        step(50)
    assert stream.getvalue() == ""
