"""What is collected of ranks and of the machine, from real files and the real kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.protocol.assignment import Assignment, Checkpointing, Source
from autoglm_resume.protocol.heartbeats import NEVER
from autoglm_resume.supervise.core.evidence import GpuErrors, RankEvidence, Refusal
from autoglm_resume.supervise.evidence import gpus
from autoglm_resume.supervise.evidence.collect import (
    KernelLog,
    Witness,
    agent_said,
    gather,
    read_end,
    within,
)
from autoglm_resume.supervise.evidence.oom import counters, rise
from autoglm_resume.supervise.ranks.group import AGENT, Exit
from autoglm_resume.supervise.ranks.observed import Observed
from autoglm_resume.supervise.ranks.script_ends import ScriptEnds
from autoglm_resume.supervise.ranks.torchrun import torchrun_log


@pytest.fixture
def task(tmp_path: Path) -> Assignment:
    return Assignment(
        run_id="r",
        attempt=0,
        world_size=2,
        master_addr="127.0.0.1",
        master_port=1,
        agent_store=False,
        max_restarts=3,
        supervisor=os.getpid(),
        directory=str(tmp_path),
        board="",
        source=Source("train.py", None, (), str(tmp_path)),
        checkpoint=Checkpointing(str(tmp_path)),
        resume=None,
        check_model=True,
    )


def ended(
    order: int, code: int | None = None, number: int | None = None, by_us: bool = False
) -> Exit:
    return Exit(code, number, 100.0 + order, order, by_us)


def script_ends(codes: dict[int, int], mono: float, stuck: set[int]) -> ScriptEnds:
    ends = ScriptEnds(60.0)
    for rank, code in codes.items():
        ends.add(rank, code, mono + 0.2 * (not rank))
    ends.stuck |= stuck
    return ends


def collect(
    task: Assignment,
    exits: dict[int, Exit],
    codes: dict[int, int] | None = None,
    stuck: set[int] = frozenset(),  # type: ignore[assignment]
    **seen: Any,
) -> list[RankEvidence]:
    """`codes` of scripts that ended at 100 s, that of rank 0 at 100.2 s."""
    pids = {rank: 1000 + rank for rank in exits}
    ends = script_ends(codes or {}, 100.0, stuck)
    return gather(task, pids, exits, (NEVER, NEVER), Observed(**seen), ends)


def test_a_rank_whose_script_failed_first_is_the_one_though_we_killed_its_process(
    task: Assignment,
) -> None:
    exits = {0: ended(0, number=9, by_us=True), 1: ended(1, number=9, by_us=True)}
    victim, root = collect(task, exits, codes={0: 1, 1: 17}, broken_at=100.0)
    assert (root.code, root.signal, root.failed) == (17, None, True)
    assert not victim.failed


def test_exits_are_told_as_they_were_seen(task: Assignment) -> None:
    first, second = collect(task, {0: ended(1, code=0), 1: ended(0, number=9)})
    assert (first.code, first.signal, first.order, first.pid) == (0, None, 1, 1000)
    assert (second.code, second.signal, second.ended, second.failed) == (None, 9, 100.0, True)


def test_what_was_seen_of_hung_ranks_goes_along(task: Assignment) -> None:
    refusal = Refusal("step-1", 1, "CorruptCheckpoint", "x")
    first, second = collect(
        task,
        {0: ended(0, number=9, by_us=True), 1: ended(1, number=9)},
        codes={1: 3},
        stuck={1},
        refusals={0: refusal},
        states={0: "stopped"},
        stacks={0: ("train.py:1 in step",)},
    )
    assert (first.refusal, first.state, first.stack) == (
        refusal,
        "stopped",
        ("train.py:1 in step",),
    )
    assert (second.code, second.signal) == (3, None), "its script had ended before it was killed"


def test_an_exception_is_told_as_the_rank_recorded_it(task: Assignment) -> None:
    record = {"type": "ValueError", "message": "bad", "traceback": "Traceback …", "mono": 7.5}
    task.error(0).write_text(json.dumps(record))
    task.error(1).write_text('{"type": "ValueEr')
    first, second = collect(task, {0: ended(0, code=1), 1: ended(1, code=1)})
    assert first.error is not None
    assert (first.error.type, first.error.message, first.error.mono) == ("ValueError", "bad", 7.5)
    assert second.error is None


def test_an_exception_in_a_process_of_the_ranks_own_is_told_as_torch_recorded_it(
    task: Assignment,
) -> None:
    before = time.monotonic()
    script = (
        "import sys; from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main(): raise ValueError('bad\\nthing')\n"
        "main()\n"
    )
    environment = {**os.environ, **task.rank_environment(1)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == 1
    _, rank = collect(task, {0: ended(0, code=0), 1: ended(1, code=1)})
    assert rank.error is not None
    assert (rank.error.type, rank.error.message) == ("ValueError", "bad\nthing")
    assert "in main" in rank.error.traceback
    assert before < rank.error.mono < time.monotonic()


def test_of_a_huge_log_only_the_end_is_read_and_only_of_ranks_that_failed(
    task: Assignment,
) -> None:
    for rank in (0, 1):
        with task.log(rank).open("wb") as file:
            file.truncate(1 << 30)
            file.seek(0, os.SEEK_END)
            file.write(b"\nstep 40\nstep 41\n")
    first, second = collect(task, {0: ended(1, code=0), 1: ended(0, code=1)})
    assert first.log == ""
    assert second.log == "step 40\nstep 41\n"


def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first line\nsecond\nthird")
    assert read_end(path, 15) == "second\nthird"
    assert read_end(path, 3) == "ird"
    assert read_end(path, 100) == "first line\nsecond\nthird"
    assert read_end(tmp_path / "none", 10) == ""


def test_an_exception_that_could_not_be_recorded_is_told_as_the_log_has_it(
    task: Assignment,
) -> None:
    for rank in (0, 1):
        task.log(rank).write_text(
            "step 41\nTraceback (most recent call last):\n"
            '  File "/home/me/train.py", line 31, in <module>\n    open(os.devnull)\n'
            "OSError: [Errno 24] Too many open files: '/dev/null'\n"
        )
    first, second = collect(task, {0: ended(0, code=1), 1: ended(1, code=17)})
    assert first.error is not None
    assert first.error.type == "OSError"
    assert first.error.message == "[Errno 24] Too many open files: '/dev/null'"
    assert first.error.traceback.startswith("Traceback")
    assert first.error.mono == first.ended
    assert second.error is None, "it had a reason of its own"


def test_a_rank_that_failed_first_but_was_slow_to_end_has_failed(task: Assignment) -> None:
    for rank, mono in ((0, 99.0), (1, 98.0)):
        record = {"type": "ValueError", "message": "bad", "traceback": "", "mono": mono}
        task.error(rank).write_text(json.dumps(record))
    exits = {0: ended(0, code=1), 1: ended(1, number=9, by_us=True)}
    _, second = collect(task, exits)
    assert (second.failed, second.code, second.signal) == (True, 1, None)
    task.error(1).write_text(json.dumps({**record, "mono": 100.5}))
    assert not collect(task, exits)[1].failed, "it raised that when it was asked to end"


TORCHRUN = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  exitcode   : -15 (pid: 1001)
Root Cause (first observed failure):
[0]:
  exitcode  : -6 (pid: 1000)
"""


def test_torchrun_knows_the_exit_codes_and_ends_the_others_itself(task: Assignment) -> None:
    torchrun_log(task).write_text(TORCHRUN)
    exits = {AGENT: ended(2, code=1), 0: ended(0), 1: ended(1)}
    first, second = collect(task, exits)
    assert (first.signal, first.failed) == (signal.SIGABRT, True)
    assert (second.signal, second.by_us) == (signal.SIGTERM, True)
    assert agent_said(task, exits).startswith("torchrun exited with code 1:   exitcode")
    assert agent_said(task, {0: ended(0, code=1)}) == ""


def test_what_does_not_answer_is_not_waited_for() -> None:
    assert within(10.0, lambda: 7) == 7
    assert within(0.01, lambda: time.sleep(1)) is None


def test_the_kernels_log_is_read_from_now_on() -> None:
    log = KernelLog()
    if log.lines() is None or not os.access("/dev/kmsg", os.W_OK):
        pytest.skip("the kernel's log can not be read and written here")
    line = f"Out of memory: Killed process {os.getpid()} (a test, not really)"
    Path("/dev/kmsg").write_text(f"before: {line}\n")
    log.close()
    log = KernelLog()
    Path("/dev/kmsg").write_text(f"{line}\n")
    Path("/dev/kmsg").write_text("autoglm: of no importance\n")
    assert log.lines() == (line,)
    assert log.lines() == (), "each line is told once"
    log.close()


def test_a_kernels_log_that_cannot_be_read_is_missing_and_not_empty(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "none")
    assert log.lines() is None
    log.close()


def test_the_witness_tells_what_this_machine_can_tell(tmp_path: Path) -> None:
    witness = Witness([os.getpid()], [tmp_path, tmp_path / "none"])
    machine = witness.machine()
    witness.close()
    paths = [space.path for space in machine.spaces]
    assert paths == [str(tmp_path), "/dev/shm"]
    assert all(space.free is not None and space.free > 0 for space in machine.spaces)
    assert machine.oom_kills in (None, 0)
    if not any(path.exists() for path in gpus.DEVICES):
        assert machine.gpus is None


# The OOM killer's counters


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A real cgroup of version 1 that allows 64 MiB."""
    group = Path(f"/sys/fs/cgroup/memory/autoglm-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    yield group
    group.rmdir()


def test_the_counter_of_a_real_cgroup_rises_when_the_kernel_kills(memory_limit: Path) -> None:
    log = KernelLog()
    hog = "import sys; sys.stdin.readline(); x = bytearray(200 << 20)"
    process = subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE)
    (memory_limit / "cgroup.procs").write_text(str(process.pid))
    before = counters([process.pid, os.getpid()])
    assert memory_limit / "memory.oom_control" in before
    assert rise(before) == 0
    process.communicate(b"\n")
    assert process.returncode == -signal.SIGKILL
    assert rise(before) == 1
    lines = log.lines()
    if lines is not None:
        assert any(f"Killed process {process.pid} " in line for line in lines)
    log.close()


def proc(tmp_path: Path, cgroup: str, mounts: str) -> Path:
    root = tmp_path / "proc"
    for name, file, text in (("7", "cgroup", cgroup), ("self", "mountinfo", mounts)):
        (root / name).mkdir(parents=True)
        (root / name / file).write_text(text)
    return root


@pytest.mark.parametrize(
    ("inside", "root"), [("/job", "/"), ("/docker/abc/job", "/docker/abc"), ("/job", "/docker/abc")]
)
def test_the_counter_is_found_also_in_a_container(tmp_path: Path, inside: str, root: str) -> None:
    mount = tmp_path / "cgroup"
    (mount / "job").mkdir(parents=True)
    events = mount / "job" / "memory.events"
    events.write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    mounts = f"41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw\n"
    before = counters([7], proc(tmp_path, f"4:cpu:/x\n0::{inside}\n", mounts))
    assert before == {events: 2}
    events.write_text("oom_kill 3\n")
    assert rise(before) == 1
    events.unlink()
    assert rise(before) is None, "a group that is gone has nothing to tell"


def test_without_counters_the_source_is_missing(tmp_path: Path) -> None:
    assert counters([7], tmp_path) == {}
    mounts = f"41 31 0:38 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    assert counters([7, 8], proc(tmp_path, "0::/\n", mounts)) == {}, "the root has no counter"
    assert rise({}) is None


# GPUs


def test_gpus_are_compared_with_what_they_were() -> None:
    before = GpuErrors(0, "bus", uncorrected=3)
    assert gpus.compared(before, GpuErrors(0, "bus", uncorrected=5)) == GpuErrors(
        0, "bus", uncorrected=2
    )
    assert gpus.compared(before, GpuErrors(0, "bus")) == GpuErrors(0, "bus")
    assert gpus.compared(before, None) == GpuErrors(0, "bus", lost=True)
    assert gpus.compared(before, GpuErrors(0, "bus", lost=True)) == GpuErrors(0, "bus", lost=True)
