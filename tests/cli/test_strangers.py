"""Looking at runs and files of people who mean no good: an answer at once, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.cli.test_app import autoglm
from tests.observe.runs import checkpoint, directory, killed_once
from tests.patience import PATIENCE

LOOKS = ("status", "explain", "logs", "ckpts")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "run"
    checkpoint(path / "checkpoints", 20, ranks=1)
    directory(path, [e for e in killed_once().events if e.event != "model"])
    log = path / "attempts" / "000" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("hello\n")
    return path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return shutil.copytree(honest, tmp_path / "run")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 << 30)


@pytest.mark.parametrize("make", [pipe, holes])
@pytest.mark.parametrize("file", ["job.json", "events.jsonl", "lock", "attempts/000/rank-0.log"])
def test_nobody_waits_for_a_pipe_or_reads_a_file_of_holes(
    make: Callable[[Path], None], file: str, run: Path
) -> None:
    if file.endswith(".log") and make is holes:
        pytest.skip("it would be printed, as it is")
    (run / file).unlink(missing_ok=True)
    make(run / file)
    for command in LOOKS:
        done = autoglm(command, run)
        assert done.returncode in (0, 1, 2), done
        assert "Traceback" not in done.stderr
        assert len(done.stdout) < 100_000


@pytest.mark.parametrize("make", [pipe, holes])
def test_a_job_file_is_a_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "job.yaml")
    done = autoglm("run", tmp_path / "job.yaml", "--dry-run")
    assert done.returncode == 2
    assert "no job file: expected" in done.stderr


WRONG = ("x", [], {"checkpoint": "x", "guards": 3, "logs": [], "heartbeat": {"timeout": {}}}, 3)


@pytest.mark.parametrize("job", WRONG, ids=range(len(WRONG)))
def test_a_job_that_makes_no_sense_is_no_defect_of_ours(job: object, run: Path) -> None:
    (run / "job.json").write_text(json.dumps(job))
    for command in (*LOOKS, "resume", "verify", "prune"):
        done = autoglm(command, run)
        assert "internal error" not in done.stderr, (command, done.stderr)
        assert "Traceback" not in done.stderr


HOLD = """
import json, sys, time
from pathlib import Path
from autoglm_resume.supervise.base import run_directory
with run_directory.RunDirectory(Path(sys.argv[1])).locked():
    (Path(sys.argv[1]) / "lock").write_bytes(sys.argv[2].encode())
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(run: Path) -> Iterator[Callable[[str], None]]:
    """Takes the run's lock, and writes into it who that is."""
    processes = []

    def hold(text: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run), text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"held\n"

    yield hold
    for process in processes:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_a_board_is_never_any_file_that_a_lock_names(
    run: Path, held: Callable[[str], None], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    os.mkfifo(own)
    board = f"/proc/{os.getpid()}/fd/../../..{own}"
    host = socket.gethostname()
    held(json.dumps({"pid": os.getpid(), "host": host, "since": 1e300, "board": board}))
    holder = RunDirectory(run).holder()
    assert holder is not None
    assert holder.board == ""
    assert autoglm("status", run).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"pid": []}',
        '{"pid": 1e999, "since": 0}',
        '{"pid": 1, "since": "x"}',
        "[" * 4000,
    ],
)
def test_a_lock_that_makes_no_sense_is_held_by_somebody(
    text: str, run: Path, held: Callable[[str], None]
) -> None:
    held(text)
    for command in ("status", "save", "stop"):
        done = autoglm(command, run)
        assert "Traceback" not in done.stderr, done.stderr
