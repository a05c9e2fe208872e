from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_resume.errors import Unkillable
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.group import Exit, WorkerGroup
from tests.patience import PATIENCE, soon

Start = Callable[[str], int]

QUIET = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); " + QUIET


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(code)`: a Python process that has printed its first line; returns its pid."""
    processes: list[subprocess.Popen[str]] = []

    def begin(code: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        if "print" in code:
            assert process.stdout is not None
            process.stdout.readline()
        return process.pid

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def ends() -> list[tuple[int, Exit]]:
    return []


@pytest.fixture
def group(loop: EventLoop, ends: list[tuple[int, Exit]]) -> WorkerGroup:
    return WorkerGroup(loop, lambda rank, how: ends.append((rank, how)))


@pytest.mark.parametrize("grace", [0.0, PATIENCE])
def test_a_rank_that_was_dying_when_the_others_were_stopped_was_not_ended_by_us(
    group: WorkerGroup, start: Start, grace: float
) -> None:
    for rank in (0, 1, 2):
        group.add(rank, start(QUIET))
    os.kill(group.pids[2], signal.SIGSTOP)
    os.kill(group.pids[0], signal.SIGKILL)
    group.stop(grace)
    assert {rank: how.by_us for rank, how in group.exits.items()} == {0: False, 1: True, 2: True}
    assert group.exits[0].signal == signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", (0, None)),
        ("raise SystemExit(3)", (3, None)),
        ("import os; os._exit(255)", (255, None)),
        ("1/0", (1, None)),
        ("import os; os.kill(os.getpid(), 9)", (None, 9)),
        ("import os; os.kill(os.getpid(), 15)", (None, 15)),
        ("import ctypes, resource; resource.setrlimit(4, (0, 0)); ctypes.string_at(0)", (None, 11)),
    ],
)
def test_an_exit_is_the_true_one(
    group: WorkerGroup,
    loop: EventLoop,
    start: Start,
    code: str,
    expected: tuple[int | None, int | None],
) -> None:
    began = time.monotonic()
    group.add(4, start(code))
    assert loop.wait(lambda: not group.alive, soon())
    how = group.exits[4]
    assert (how.code, how.signal) == expected
    assert not how.by_us
    assert began <= how.mono <= time.monotonic()


def test_exits_keep_their_order_and_are_told_once(
    group: WorkerGroup, loop: EventLoop, start: Start, ends: list[tuple[int, Exit]]
) -> None:
    for rank in range(3):
        group.add(rank, start(QUIET))
    assert group.alive == [0, 1, 2]
    for rank in (2, 0, 1):
        group.signal(rank, signal.SIGKILL)
        assert loop.wait(lambda rank=rank: rank not in group.alive, soon())  # type: ignore[misc]
    assert [(rank, how.order) for rank, how in ends] == [(2, 0), (0, 1), (1, 2)]
    group.signal(0, signal.SIGKILL)
    assert group.alive == []


def test_a_group_that_ends_on_sigterm_needs_no_grace(group: WorkerGroup, start: Start) -> None:
    for rank in range(3):
        group.add(rank, start(QUIET))
    began = time.monotonic()
    group.stop(30.0)
    assert time.monotonic() - began < 10
    assert {(how.signal, how.by_us) for how in group.exits.values()} == {(signal.SIGTERM, True)}


def test_who_ignores_sigterm_is_killed_after_the_grace(group: WorkerGroup, start: Start) -> None:
    group.add(0, start(STUBBORN))
    group.add(1, start(QUIET))
    began = time.monotonic()
    group.stop(0.2)
    assert 0.2 <= time.monotonic() - began < 10
    assert group.exits[0].signal == signal.SIGKILL
    assert group.exits[1].signal == signal.SIGTERM


def test_without_grace_everybody_is_killed_at_once(group: WorkerGroup, start: Start) -> None:
    group.add(0, start(QUIET))
    group.stop(0.0)
    assert group.exits[0].signal == signal.SIGKILL


def test_a_stopped_process_is_ended_by_sigterm(group: WorkerGroup, start: Start) -> None:
    pid = start(QUIET)
    os.kill(pid, signal.SIGSTOP)
    group.add(0, pid)
    began = time.monotonic()
    group.stop(30.0)
    assert time.monotonic() - began < 10
    assert group.exits[0].signal == signal.SIGTERM


def test_a_stopped_process_that_ignores_sigterm_is_killed(group: WorkerGroup, start: Start) -> None:
    pid = start(STUBBORN)
    os.kill(pid, signal.SIGSTOP)
    group.add(0, pid)
    group.stop(0.05)
    assert group.exits[0].signal == signal.SIGKILL


def test_who_lingers_may_end_by_itself_after_the_others(group: WorkerGroup, start: Start) -> None:
    rank = start(QUIET)
    agent = start(
        "import os, select, signal; signal.signal(15, signal.SIG_IGN); "
        f"fd = os.pidfd_open({rank}); print('up', flush=True); "
        "select.select([fd], [], []); os._exit(5)"
    )
    group.add(-1, agent)
    group.add(0, rank)
    group.stop(20.0, linger=frozenset([-1]))
    assert (group.exits[-1].code, group.exits[-1].signal) == (5, None)
    assert group.exits[0].order == 0


def test_who_lingers_too_long_is_killed(
    group: WorkerGroup, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_resume.supervise.ranks.group.REPORT", 1.0)
    group.add(-1, start(QUIET))
    group.add(0, start(QUIET))
    group.stop(0.1, linger=frozenset([-1]))
    assert group.exits[-1].signal == signal.SIGKILL


def test_an_exit_before_the_stop_is_not_ours(
    group: WorkerGroup, loop: EventLoop, start: Start
) -> None:
    group.add(0, start("raise SystemExit(3)"))
    assert loop.wait(lambda: not group.alive, soon())
    group.add(1, start(QUIET))
    group.stop(0.0)
    assert (group.exits[0].by_us, group.exits[1].by_us) == (False, True)


def test_a_process_that_is_not_ours_is_watched_without_its_code(
    group: WorkerGroup, loop: EventLoop, start: Start, tmp_path: Path
) -> None:
    middle = subprocess.Popen(
        [
            *(sys.executable, "-S", "-c"),
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', "
            "'input()'], stdin=subprocess.PIPE); print(p.pid, flush=True); input(); p.kill(); "
            "p.wait(); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert middle.stdout is not None
    assert middle.stdin is not None
    group.add(0, int(middle.stdout.readline()))
    assert group.alive == [0]
    print(file=middle.stdin, flush=True)
    assert loop.wait(lambda: not group.alive, soon())
    assert (group.exits[0].code, group.exits[0].signal) == (None, None)
    middle.communicate("\n")


def test_a_process_that_is_gone_already_has_ended(
    group: WorkerGroup, ends: list[tuple[int, Exit]], loop: EventLoop
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    group.add(0, gone.pid)
    assert group.alive == []
    assert [rank for rank, _ in ends] == [0]


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_no_descriptor_is_left_open(loop: EventLoop, start: Start) -> None:
    before = descriptors()
    group = WorkerGroup(loop, lambda *_: None)
    pid = start("pass")
    opened = descriptors()
    group.add(0, pid)
    assert loop.wait(lambda: not group.alive, soon())
    assert descriptors() == opened
    assert before <= opened


ORPHANS = """
import json, os, signal, subprocess, sys
import psutil
from autoglm_resume import linux
from autoglm_resume.supervise.ranks.group import end_orphans
linux.adopt_orphans()
sleep = [sys.executable, "-S", "-c", "import signal; signal.signal(15, signal.SIG_IGN); "
         "signal.pause()"]
kept = subprocess.Popen(sleep)
family = subprocess.Popen(
    [sys.executable, "-S", "-c", '''
import subprocess, sys
sleep = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
inner = '''
    + repr("import subprocess, sys; print(subprocess.Popen(sys.argv[1:], "
           "start_new_session=True).pid, flush=True); import signal; signal.pause()")
    + '''
child = subprocess.Popen([sys.executable, "-S", "-c", inner, *sleep], stdout=subprocess.PIPE)
print(child.pid, int(child.stdout.readline()), flush=True)
import signal; signal.pause()
'''], stdout=subprocess.PIPE)
child, grandchild = map(int, family.stdout.readline().split())
everybody = {family.pid, child, grandchild}
ended = end_orphans(frozenset([kept.pid]))
print(json.dumps({
    "ended": sorted(ended) == sorted(everybody),
    "left": [pid for pid in everybody if psutil.pid_exists(pid)],
    "kept": kept.poll() is None,
    "again": end_orphans(frozenset([kept.pid])),
    "all": end_orphans(frozenset()) == [kept.pid],
    "children": len(psutil.Process().children(recursive=True)),
}))
"""


def test_orphans_of_all_generations_are_ended_and_what_is_kept_lives() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "ended": True,
        "left": [],
        "kept": True,
        "again": [],
        "all": True,
        "children": 0,
    }


@pytest.fixture
def frozen() -> Iterator[Callable[[int], None]]:
    """`frozen(pid)` puts a process where not even SIGKILL reaches it (freezer of cgroup v1)."""
    cgroup = Path("/sys/fs/cgroup/freezer") / f"autoglm-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer here: {error}")

    def freeze(pid: int) -> None:
        (cgroup / "cgroup.procs").write_text(str(pid))
        (cgroup / "freezer.state").write_text("FROZEN")
        while (cgroup / "freezer.state").read_text().strip() != "FROZEN":
            pass

    yield freeze
    (cgroup / "freezer.state").write_text("THAWED")
    for pid in (cgroup / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    while (cgroup / "cgroup.procs").read_text():
        pass
    cgroup.rmdir()


def test_a_process_that_is_stuck_in_the_kernel_is_named_and_not_waited_for_for_ever(
    group: WorkerGroup,
    start: Start,
    frozen: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoglm_resume.supervise.ranks.group.UNKILLABLE", 0.05)
    stuck, other = start(QUIET), start(QUIET)
    group.add(0, other)
    group.add(1, stuck)
    frozen(stuck)
    with pytest.raises(Unkillable) as caught:
        group.stop(0.0)
    assert f"rank 1 (process {stuck}, disk-sleep)" in caught.value.message
    assert caught.value.exit_code == 75  # another machine can go on
    assert group.exits[0].signal == signal.SIGKILL
    group.stop(0.0)  # and is given up for good
