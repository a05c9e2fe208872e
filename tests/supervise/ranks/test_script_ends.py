"""Ranks that hang in the interpreter's own end, as real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from autoglm_resume.supervise.ranks.script_ends import ScriptEnds


@pytest.fixture
def idle() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def busy() -> Iterator[int]:
    """Process id of one that computes, and has done so for a tenth of a second."""
    code = "import time\nwhile time.process_time() < .1: pass\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.stdout.close()
    process.kill()
    process.wait()


def test_a_process_that_does_nothing_after_its_script_is_stuck_and_one_that_works_is_not(
    idle: int, busy: int
) -> None:
    ends, pids = ScriptEnds(60.0), {0: idle, 1: busy, 2: idle}
    ends.add(0, 0, 100.0)
    ends.add(1, 0, 100.0)
    assert ends.newly_stuck(159.0, [0, 1, 2], pids) == []
    assert ends.newly_stuck(161.0, [0, 1, 2], pids) == [0]
    assert ends.newly_stuck(162.0, [0, 1, 2], pids) == [], "it is told once"
    assert ends.stuck == {0}


def test_a_process_that_is_gone_is_not_waited_for(idle: int) -> None:
    ends = ScriptEnds(60.0)
    ends.add(0, 0, 100.0)
    assert ends.newly_stuck(1000.0, [], {0: idle}) == []


def test_only_a_script_that_failed_by_then_failed_first() -> None:
    ends = ScriptEnds(60.0)
    ends.add(0, 1, 100.0)
    ends.add(1, 1, 101.0)
    ends.add(2, 75, 99.0)
    assert [ends.failed_before(rank, 100.5) for rank in range(4)] == [True, False, False, False]
    assert not ends.failed_before(0, None)


def test_all_is_well_once_every_script_has_come_to_a_good_end() -> None:
    ends = ScriptEnds(60.0)
    ends.add(0, 0, 1.0)
    assert not ends.all_well(2)
    ends.add(1, 75, 2.0)
    assert ends.all_well(2)
    ends.add(1, 1, 2.0)
    assert not ends.all_well(2)
