"""Kills at random ranks and moments, and other numbers of ranks, leave no trace in the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "exactness"


def passed(directory: Path, *words: str) -> list[dict[str, Any]]:
    """The checks of the program, all of which are good."""
    report = directory / "report.json"
    command = [sys.executable, BENCH, *words, "--seed", "1", "--json", report]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks: list[dict[str, Any]] = json.loads(report.read_text())["checks"]
    assert checks
    assert all(check["ok"] for check in checks)
    return checks


@pytest.mark.slow
@pytest.mark.thorough
def test_twenty_random_kills_change_neither_weights_nor_samples(tmp_path: Path) -> None:
    checks = passed(tmp_path, "--count", "20")
    kills = next(check for check in checks if "kills" in check["name"])
    assert kills["measured"] >= 20


@pytest.mark.slow
def test_kills_change_nothing_where_every_step_is_saved_as_a_delta(tmp_path: Path) -> None:
    passed(tmp_path, "--mode", "every-step", "--count", "1")


@pytest.mark.slow
def test_four_ranks_then_two_then_three_see_every_sample_once(tmp_path: Path) -> None:
    passed(tmp_path, "--mode", "elastic")
