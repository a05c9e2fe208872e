from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.evidence import stacks
from autoglm_resume.supervise.ranks.group import WorkerGroup

WHOLE = """\
Thread 0x00007f5eb69566c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x00007f5edb474b80 [python] (most recent call first):
  File "/home/me/a, line 3 in b.py", line 12 in compute
  File "/home/me/train.py", line 65 in <module>
  File "RANK", line 105 in _execute
  File "<frozen runpy>", line 198 in _run_module_as_main
""".replace("RANK", stacks.RANK)
FRAMES = ("/home/me/a, line 3 in b.py:12 in compute", "/home/me/train.py:65 in <module>")


def test_the_main_threads_frames_are_read_down_to_the_script() -> None:
    assert stacks.main_thread(WHOLE) == FRAMES


def test_the_main_thread_is_the_last_one_whoever_took_the_signal() -> None:
    assert stacks.main_thread(WHOLE.replace("Current thread 0x00007f5edb", "Thread 0x1")) == FRAMES


@pytest.mark.parametrize("cut", range(0, len(WHOLE) - 2, 7))
def test_a_stack_that_is_still_being_written_is_none(cut: int) -> None:
    assert stacks.main_thread(WHOLE[:cut]) == ()


def test_a_stack_that_was_too_deep_is_taken_as_far_as_it_goes() -> None:
    lines = WHOLE.splitlines(keepends=True)
    assert stacks.main_thread("".join([*lines[:5], "  ...\n"])) == FRAMES[:1]


SLEEPS = """
import faulthandler, sys, time
from autoglm_resume.protocol.assignment import STACKS
def dream():
    print("asleep", flush=True)
    {}
if len(sys.argv) > 1:
    faulthandler.register(STACKS, file=open(sys.argv[1], "w"), all_threads=True)
dream()
"""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[EventLoop, WorkerGroup]]:
    loop, watch = EventLoop(), DirectoryWatch()
    watch.add(tmp_path)
    loop.watch(watch, lambda: list(watch.changed()) and None)
    group = WorkerGroup(loop, lambda *_: None)
    yield loop, group
    group.stop(0.0)
    watch.close()


@pytest.mark.parametrize("how", ["time.sleep(1000)", "sum(range(10**13))"])
@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_tell_where_they_sleep_hold_the_lock_or_are_stopped(
    watched: tuple[EventLoop, WorkerGroup], tmp_path: Path, how: str, stopped: bool
) -> None:
    loop, group = watched
    (tmp_path / "dreams.py").write_text(SLEEPS.format(how))
    command = [sys.executable, "-m", "dreams", str(tmp_path / "0")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    group.add(0, process.pid)
    if stopped:
        group.signal(0, 19)
    found = stacks.collect(loop, group, [0], lambda rank: tmp_path / str(rank))
    place, _, function = found[0][0].rpartition(":")
    assert place == str(tmp_path / "dreams.py")
    assert function in ("5 in dream", "6 in dream")  # it may be printing still
    assert 0 in group.alive  # it is not killed by being asked
    process.stdout.close()


def test_one_that_does_not_answer_is_not_waited_for_long(
    watched: tuple[EventLoop, WorkerGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, group = watched
    monkeypatch.setattr(stacks, "PATIENCE", 0.05)
    process = subprocess.Popen(["env", "--ignore-signal", "sleep", "1000"])
    group.add(0, process.pid)
    assert stacks.collect(loop, group, [0], lambda rank: tmp_path / "none") == {}


def test_only_files_in_which_nothing_stands_are_removed(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.write_text("")
    full.write_text("a stack")
    stacks.tidy([empty, full, tmp_path / "never"])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
