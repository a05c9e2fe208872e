"""Journals that the version before this one wrote, beside what that one made of them.

`data/journals` has a run each: its journal and job, and what was shown, said and recalled of it.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import journal
from autoglm_resume.events import Unknown, to_record
from autoglm_resume.observe import status, telling
from autoglm_resume.observe.pure.say import sentence
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.history import recall

JOURNALS = sorted(Path(__file__).parent.glob("data/journals/*/"))


@pytest.fixture(params=JOURNALS, ids=lambda path: path.name)
def older(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def run(older: Path, tmp_path: Path) -> Iterator[RunDirectory]:
    for name in ("events.jsonl", "job.json"):
        shutil.copy(older / name, tmp_path / name)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TZ", "UTC")
        time.tzset()
        yield RunDirectory(tmp_path)
    time.tzset()


def plain(value: Any) -> Any:
    """As JSON has it."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.value if isinstance(value, enum.Enum) else value


def test_every_line_is_understood_and_would_be_written_alike(older: Path) -> None:
    for line in (older / "events.jsonl").read_text().splitlines():
        (event,) = journal.decode(line.encode())
        assert not isinstance(event, Unknown)
        assert json.dumps(to_record(event)) == json.dumps(json.loads(line))


def test_the_same_is_said(older: Path) -> None:
    said = map(sentence, journal.read(older / "events.jsonl"))
    assert "".join(f"{text}\n" for text in said if text) == (older / "said.txt").read_text()


def test_the_same_is_recalled(older: Path) -> None:
    past = plain(recall(journal.read(older / "events.jsonl")))
    expected = json.loads((older / "recall.json").read_text())
    assert {name: past[name] for name in expected} == expected


def test_the_same_status_is_shown(
    run: RunDirectory, older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status.show(status.of(run))
    shown = capsys.readouterr().out.replace(str(run.path), "RUN")
    assert shown == (older / "status.txt").read_text()


def test_the_same_explanation_is_given(
    run: RunDirectory, older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    telling.show(run.path, telling.of(run), sys.stdout)
    assert capsys.readouterr().out == (older / "explain.txt").read_text()
