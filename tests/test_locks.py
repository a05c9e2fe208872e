from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume import locks
from autoglm_resume.errors import RunLocked

TRAIN = """
import os, signal, sys
from pathlib import Path
from autoglm_resume import locks
locks.train_first(Path(sys.argv[1]), "train.py --lr 0.1")
if "fork" in sys.argv and os.fork() == 0:
    print("held", os.getpid(), flush=True)
    signal.pause()
if "fork" not in sys.argv:
    print("held", flush=True)
signal.pause()
"""


def training(directory: Path, *how: str) -> tuple[subprocess.Popen[str], str]:
    """A process that has the checkpoints in `directory`, and what it says."""
    command = [sys.executable, "-c", TRAIN, str(directory), *how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_only_one_launch_trains_and_the_other_is_told_which(tmp_path: Path) -> None:
    process, _ = training(tmp_path)
    for _ in range(2):
        with pytest.raises(RunLocked, match=rf"process {process.pid} .*\(train.py --lr 0.1\)"):
            locks.train_first(tmp_path, "train.py --lr 0.01")
    with pytest.raises(RunLocked, match=r"train\.py --lr 0\.1"), locks.locked_checkpoints(tmp_path):
        pass
    who = locks.holder(tmp_path / locks.CHECKPOINTS)
    assert who is not None
    assert who.pid == process.pid
    end(process)
    assert locks.holder(tmp_path / locks.CHECKPOINTS) is None
    assert locks.train_first(tmp_path, "") == ""
    locks.leave(tmp_path)


def test_the_other_ranks_of_a_launch_share_it_and_hold_it_after_rank_0(tmp_path: Path) -> None:
    process, _ = training(tmp_path)
    locks.train_too(tmp_path)
    end(process)
    other, said = training(tmp_path)
    assert said == "", "rank 1 still trains"
    other.wait()
    locks.leave(tmp_path)
    process, said = training(tmp_path)
    assert said == "held\n"
    end(process)


def test_what_a_training_has_forked_does_not_hold_it(tmp_path: Path) -> None:
    process, said = training(tmp_path, "fork")
    child = int(said.split()[1])
    end(process)
    try:
        assert locks.train_first(tmp_path, "") == ""
    finally:
        locks.leave(tmp_path)
        os.kill(child, signal.SIGKILL)


def test_a_script_and_a_supervisor_keep_each_other_out(tmp_path: Path) -> None:
    with locks.locked_checkpoints(tmp_path, tmp_path / "run"):
        process, said = training(tmp_path)
        assert said == ""
        process.wait()
    process, said = training(tmp_path)
    assert said == "held\n"
    who = locks.holder(tmp_path / locks.CHECKPOINTS)
    assert who is not None
    assert who.run == str(tmp_path / "run"), "whose checkpoints they are stays known"
    end(process)


def test_one_process_may_ask_twice_but_not_for_another_directory_in_its_place(
    tmp_path: Path,
) -> None:
    there = tmp_path / "checkpoints"
    assert locks.train_first(there, "") == ""
    assert locks.train_first(there, "") == ""
    there.rename(tmp_path / "aside")
    process, said = training(there)
    assert said == "held\n"
    with pytest.raises(RunLocked):
        locks.train_first(there, "")
    end(process)


NO_OFD = """
import fcntl, errno, sys
from pathlib import Path
from autoglm_resume import locks
before = fcntl.fcntl
def without(fd, how, *rest):
    if how in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
        raise OSError(errno.ENOSYS, "Function not implemented")
    return before(fd, how, *rest)
fcntl.fcntl = without
if "flock" in sys.argv:
    def none(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = none
print(locks.train_first(Path(sys.argv[1]), "x") or "held", flush=True)
print(locks.holder(Path(sys.argv[1]) / ".lock").pid, flush=True)
sys.stdin.read()
"""


def without_locks(directory: Path, *how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", NO_OFD, str(directory), *how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_where_the_kernel_lacks_such_locks_others_are_taken(tmp_path: Path) -> None:
    first = without_locks(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    assert int(first.stdout.readline()) == first.pid
    second = without_locks(tmp_path)
    assert "RunLocked" in second.communicate()[1]
    first.communicate("")
    third = without_locks(tmp_path)
    assert third.communicate("")[0].startswith("held\n")


def test_where_there_are_none_at_all_that_is_said(tmp_path: Path) -> None:
    process = without_locks(tmp_path, "flock")
    out, _ = process.communicate("")
    assert out.startswith(f"{tmp_path / '.lock'}: this file system has no locks (No locks avail")
