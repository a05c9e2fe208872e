from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.worker import environment_reads


@pytest.mark.parametrize(
    "ask",
    [
        lambda: os.environ["LOCAL_RANK"],
        lambda: os.getenv("RANK", "-1"),
        lambda: os.environ.get("RANK"),
        lambda: "RANK" in os.environ,
        lambda: dict(os.environ),
        lambda: os.environ.copy(),
    ],
)
def test_who_asks_for_the_rank_is_noticed_however_it_asks(
    monkeypatch: pytest.MonkeyPatch, ask: object
) -> None:
    assert callable(ask)
    monkeypatch.setenv("LOCAL_RANK", "3")
    environment_reads.watch()
    os.environ.get("HOME")
    assert environment_reads.read_of_rank() == ""
    ask()
    environment_reads.stop()
    assert environment_reads.read_of_rank() in ("RANK", "LOCAL_RANK")
    environment_reads.watch()
    environment_reads.stop()
    os.environ.get("RANK")
    assert environment_reads.read_of_rank() == ""


def test_what_was_set_changed_or_removed_since_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEPT", "GONE", "OTHER"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("NEW", raising=False)
    environment_reads.watch()
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("OTHER", "2")
    monkeypatch.setenv("NEW", "")
    monkeypatch.delenv("GONE")
    environment_reads.assume({"ASSUMED": "yes"})
    environment_reads.stop()
    assert environment_reads.changed() == {"GONE", "OTHER", "NEW"}
    assert environment_reads.before()["OTHER"] == "1"
    monkeypatch.delenv("ASSUMED")


def test_a_read_is_that_of_every_module_that_is_being_imported(tmp_path: Path) -> None:
    (tmp_path / "above.py").write_text("import below")
    (tmp_path / "below.py").write_text(
        "import os\ndef ask():\n    return os.environ.get('HUB')\nask()\nlater = ask"
    )
    (tmp_path / "beside.py").write_text("import os, below\nHOME = os.environ.get('HOME')")
    code = """
from autoglm_resume.worker import environment_reads as reads
reads.watch()
import above, beside, below
below.later()
hub = frozenset({"HUB"})
print([name for name in ("above", "below", "beside") if reads.read_by([name], hub)])
print(reads.read_by(["beside", "below", "above"], hub), [reads.read_by(["above"], frozenset())])
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "['above', 'below']\nbelow ['']\n", done.stderr
