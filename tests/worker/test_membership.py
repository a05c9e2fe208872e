from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import autoglm_resume as autoglm
from autoglm_resume.protocol.assignment import ASSIGNMENT
from tests.patience import PATIENCE
from tests.worker.conftest import Make


def test_under_a_supervisor_a_session_names_run_attempt_and_directory(
    assign: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "runs" / "demo" / "attempts" / "003"
    directory.mkdir(parents=True)
    task = assign("", attempt=3, directory=str(directory))
    monkeypatch.setenv(ASSIGNMENT, str(task.path))
    monkeypatch.setenv("RANK", "0")
    session = autoglm.init()
    assert (session.run_id, session.attempt) == ("run", 3)
    assert session.run_dir == tmp_path / "runs" / "demo"


def test_dir_lists_what_scripts_may_use_and_imports_nothing() -> None:
    code = "import sys, autoglm_resume as a; print(*dir(a)); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    names, torch = done.stdout.splitlines()
    assert names.split() == sorted(autoglm.__all__)
    assert torch == "False"
