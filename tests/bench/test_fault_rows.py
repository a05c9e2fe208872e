"""The table of faults: every row expects what the program can say, and the training can do."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from autoglm_resume.failures import Kind

ROOT = Path(__file__).parents[2]
ACTIONS = {"restart", "roll_back", "pause", "smaller", "requeue", "give_up", "none"}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    from lib import fault_rows

    return fault_rows


def test_there_are_25_and_each_has_a_name_of_its_own(rows: ModuleType) -> None:
    names = [fault.name for fault in rows.FAULTS]
    assert len(names) == len(set(names)) >= 25


def test_classes_and_answers_are_those_of_the_vocabulary(rows: ModuleType) -> None:
    kinds = {kind.value for kind in Kind} | {"none"}
    for fault in rows.FAULTS:
        assert set(re.split(r", |\|", fault.kinds)) <= kinds, fault.name
        assert set(re.split(r", |\|", fault.answers)) <= ACTIONS, fault.name


def test_what_a_row_asks_the_script_for_is_something_the_script_does(rows: ModuleType) -> None:
    script = (ROOT / "tests" / "faults" / "train.py").read_text()
    for fault in rows.FAULTS:
        for word in fault.words:
            if word.startswith("--fail="):
                assert f'"{word.removeprefix("--fail=")}"' in script, fault.name


def test_a_fault_comes_from_outside_or_from_the_script(rows: ModuleType) -> None:
    for fault in rows.FAULTS:
        assert fault.strike or fault.words, fault.name
