from __future__ import annotations

import contextlib
import io
import json
import os
import pty
from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.observe import telling
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import Script, directory, killed_once


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(directory(tmp_path / "demo", killed_once().events))


def shown(run: RunDirectory, attempt: int | None = None) -> list[str]:
    stream = io.StringIO()
    telling.show(run.path, telling.of(run, attempt), stream)
    return stream.getvalue().splitlines()


def on_a_terminal(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        telling.show(run.path, telling.of(run), stream)
    data = b""
    with contextlib.suppress(OSError):  # that is how a terminal ends whose other side is closed
        while more := os.read(ours, 65536):
            data += more
    os.close(ours)
    return data.decode()


def test_elsewhere_each_fact_is_one_plain_line(run: RunDirectory) -> None:
    lines = shown(run)
    assert lines[0] == "demo: done at step 10"
    labels = [line.split()[0] for line in lines if line.startswith("  ")]
    assert labels == ["failed", "concluded", "done", "cost"]
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_has_colours_and_lines_no_wider_than_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m  failed" in on_a_terminal(run, monkeypatch, 60)
    monkeypatch.setenv("NO_COLOR", "1")
    text = on_a_terminal(run, monkeypatch, 60)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 60
    assert "\n             ordered by --drill" in text.replace("\r", "")


def test_what_a_rank_said_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    script = Script().life().attempt(0).fails(0, 7, tail="\x1b]0;title\x07gone\x1b[2J")
    (line,) = (
        line
        for line in shown(RunDirectory(directory(tmp_path / "demo", script.events)))
        if line.startswith("  line")
    )
    assert line == "  line       gone (log)"


def test_one_attempt_can_be_asked_for(run: RunDirectory) -> None:
    assert "attempt 0" not in "\n".join(shown(run, 1))
    with pytest.raises(UsageError, match="no attempt 7; found attempts 0 to 1"):
        telling.of(run, 7)


def test_the_json_form_has_every_figure(run: RunDirectory) -> None:
    document = json.loads(json.dumps(telling.to_json(run.path, telling.of(run))))
    first, second = document["attempts"]
    assert document["now"] == "done at step 10"
    assert first["recovery"]["phases"]["detect"] == pytest.approx(0.04)
    assert first["decided"]["action"] == "restart"
    assert first["paragraph"][0][0] == "failed"
    assert second["recovery"] is None
