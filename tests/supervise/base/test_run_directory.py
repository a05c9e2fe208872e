from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_resume.errors import RunLocked, UsageError
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.supervise.base.run_directory import RunDirectory

HOLD = """
import signal, sys
from pathlib import Path
from autoglm_resume.supervise.base.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked() as lock:
    lock.describe("/proc/7/fd/8")
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_has_is_refused_naming_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(RunLocked) as caught, run.locked():
        pass
    assert caught.value.exit_code == 76
    assert f"process {holder.pid} on {socket.gethostname()}" in caught.value.message
    assert "autoglm stop" in caught.value.hint


def test_who_holds_a_run_can_be_asked(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = RunDirectory(tmp_path).holder()
    assert who is not None
    assert (who.pid, who.host, who.board) == (holder.pid, socket.gethostname(), "/proc/7/fd/8")
    assert 0 <= time.time() - who.since < 60


def test_a_lock_does_not_outlive_its_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    run = RunDirectory(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run.holder() is None
    with run.locked() as lock:
        lock.describe("")
        who = run.holder()
        assert who is not None
        assert who.pid == os.getpid()
    assert run.holder() is None


def test_a_program_that_the_holder_started_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.locked():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with run.locked():
        pass
    child.communicate(b"\n")


def test_a_shorter_description_replaces_a_longer_one_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.locked() as lock:
        lock.describe("/proc/1/fd/" + "9" * 300)
        lock.describe("/proc/1/fd/2")
        who = run.holder()
        assert who is not None
        assert who.board == "/proc/1/fd/2"


def test_asking_who_holds_a_run_never_keeps_anybody_from_starting_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.locked():
        pass
    asking = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            while True:
                run.holder()
        asking.append(pid)
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            with run.locked():
                pass
    finally:
        for pid in asking:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_nobody_holds_what_was_never_started(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "never")
    assert run.holder() is None
    assert not run.exists
    assert run.events() == []
    assert not run.path.exists(), "asking must not make anything"


def test_two_runs_cannot_write_to_one_checkpoint_directory(tmp_path: Path) -> None:
    refused = pytest.raises(RunLocked, match=f"process {os.getpid()}")
    shared = tmp_path / "shared"
    with locked_checkpoints(shared), refused, locked_checkpoints(shared):
        pass
    with locked_checkpoints(tmp_path / "shared"):
        pass


def test_the_job_is_kept_and_comes_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save_job({"name": "x", "args": ["\N{SNOWMAN}"]})
    assert run.exists
    assert run.job() == {"name": "x", "args": ["\N{SNOWMAN}"]}
    assert run.attempt(7) == tmp_path / "attempts" / "007"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no run was started here"),
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ("\xff", "expected JSON"),
    ],
)
def test_a_directory_without_a_job_is_refused_by_name(
    tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "job.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=says) as caught:
        RunDirectory(tmp_path).job()
    assert str(tmp_path) in caught.value.message
