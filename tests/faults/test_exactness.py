"""Twenty kills at random ranks and moments leave no trace in the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "exactness"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twenty_random_kills_change_neither_weights_nor_samples(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, BENCH, "--count", "20", "--seed", "1", "--json", report]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks = json.loads(report.read_text())["checks"]
    assert checks
    assert all(check["ok"] for check in checks)
    kills = next(check for check in checks if "kills" in check["name"])
    assert kills["measured"] >= 20
