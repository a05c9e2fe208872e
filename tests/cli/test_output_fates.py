"""The exit code of a command is what it did, whatever becomes of what it prints."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.observe.runs import checkpoint, directory, flip, killed_once
from tests.patience import PATIENCE

CLI = [sys.executable, "-m", "autoglm_resume.cli"]
COMMANDS = {
    "status RUN": 0,
    "status RUN --json": 0,
    "status nothing": 2,
    "explain RUN": 0,
    "logs RUN": 0,
    "ckpts RUN": 0,
    "inspect ckpt RUN": 90,
    "verify RUN": 90,
    "prune RUN --dry-run --keep 3": 0,
    "stop RUN": 0,
    "save RUN": 1,
    "schema": 0,
    "--help": 0,
    "nonsense": 2,
}
FATES = (">/dev/full", ">/dev/full 2>/dev/full", "<&- >&- 2>&-", "| head -c 1 >/dev/null")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one checkpoint is damaged."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    newest = checkpoint(path / "checkpoints", 20)
    directory(path, [e for e in killed_once().events if e.event != "model"])
    flip(newest / "rank-00000.json")
    log = path / "attempts" / "000" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {n}\n" for n in range(20_000)))
    return path


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_exit_code_holds(command: str, run: Path, tmp_path: Path) -> None:
    words = [str(run) if word == "RUN" else word for word in command.split()]
    for fate in FATES:
        done = subprocess.run(
            ["bash", "-c", f'"$0" "$@" {fate}; exit ${{PIPESTATUS[0]}}', *CLI, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (COMMANDS[command], False), fate
        if fate == ">/dev/full" and COMMANDS[command] in (0, 90):
            lost = "standard output: No space left on device; not all of it could be written"
            assert (lost in done.stderr) == (command != "--help"), done.stderr


def test_a_terminal_that_is_gone_changes_nothing(run: Path) -> None:
    terminal, ours = pty.openpty()
    with subprocess.Popen([*CLI, "ckpts", run], stdout=ours, stderr=ours) as process:
        os.close(terminal)
        os.close(ours)
        assert process.wait(PATIENCE) == 0
