from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from autoglm_resume import events
from autoglm_resume.protocol import silences
from autoglm_resume.protocol.heartbeats import Board, Phase, Pulse
from autoglm_resume.supervise.core import liveness
from autoglm_resume.supervise.core.history import added
from autoglm_resume.supervise.core.liveness import Limits
from autoglm_resume.supervise.ranks import hang_detector
from autoglm_resume.supervise.ranks.hang_detector import HangDetector

SECOND = 10**9
LIMITS = Limits(300.0, 900.0)
TENTH = {silences.bucket(SECOND // 10): 1000}
USUAL = {rank: {int(phase): dict(TENTH) for phase in Phase} for rank in (0, 1)}


@pytest.fixture
def board() -> Iterator[Board]:
    made, fd = Board.create(2)
    yield made
    made.close()
    os.close(fd)


@pytest.fixture
def pulses(board: Board) -> list[Pulse]:
    """Of two ranks that have trained a step, and are in the next one's forward pass."""
    both = [board.pulse(rank) for rank in (0, 1)]
    for pulse in both:
        pulse.completed(1)
        pulse.phase(Phase.FORWARD)
    return both


@pytest.fixture
def idle() -> Iterator[int]:
    """Process id of one that does nothing."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def busy() -> Iterator[int]:
    """Process id of one that computes."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process.pid
    process.kill()
    process.wait()


def minutes(watch: HangDetector, pids: dict[int, int], upto: float) -> list[int]:
    """Look as often as a supervisor would, `upto` seconds from now on; the first ranks that hang.

    Only the clock is not the real one.
    """
    begin = time.monotonic()
    for tick in range(int(upto)):
        looks = watch.looks(begin + tick, pids)
        if hung := liveness.hung(looks, begin + tick, LIMITS):
            watch.condemn(hung, begin + tick)
            return hung
    return []


@pytest.mark.usefixtures("pulses")
def test_ranks_that_fall_silent_in_a_pass_are_seen_by_what_is_usual(
    board: Board, idle: int
) -> None:
    pids = {0: idle, 1: idle}
    watch = HangDetector(board, LIMITS, USUAL)
    assert minutes(watch, pids, 60) == [0, 1]
    # Had they gone on by themselves, the next attempt must not end them again so soon.
    taught = added(USUAL, watch.silences())
    assert minutes(HangDetector(board, LIMITS, taught), pids, 200) == []
    assert minutes(HangDetector(board, LIMITS, {}), pids, 299) == []
    assert minutes(HangDetector(board, LIMITS, {}), pids, 310) == [0, 1]


def test_only_ranks_that_live_can_hang_or_be_waited_for(
    board: Board, pulses: list[Pulse], idle: int
) -> None:
    pulses[0].phase(Phase.BACKWARD)
    assert minutes(HangDetector(board, LIMITS, USUAL), {0: idle}, 60) == [0]


def test_between_steps_a_busy_rank_is_left_alone_and_an_idle_one_is_not(
    board: Board, pulses: list[Pulse], idle: int, busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pulse in pulses:
        pulse.completed(2)
    # The simulated minutes pass in an instant, in which nobody can use much of a processor.
    monkeypatch.setattr(hang_detector, "CPU_NOISE", -1.0)
    monkeypatch.setattr(hang_detector, "IDLE_SHARE", 0.0)
    assert minutes(HangDetector(board, LIMITS, USUAL), {0: busy, 1: busy}, 250) == []
    monkeypatch.setattr(hang_detector, "CPU_NOISE", 1e9)
    assert minutes(HangDetector(board, LIMITS, USUAL), {0: idle, 1: idle}, 60) == [0, 1]


def test_a_stopped_process_is_seen_wherever_it_is(
    board: Board, pulses: list[Pulse], idle: int
) -> None:
    pulses[1].completed(2)
    pulses[0].completed(2)
    os.kill(idle, signal.SIGSTOP)
    while hang_detector.machine.state(idle) != "stopped":
        pass
    assert 1 in minutes(HangDetector(board, LIMITS, USUAL), {0: os.getpid(), 1: idle}, 3)


def test_a_machine_that_stood_still_blames_nobody(
    board: Board, pulses: list[Pulse], idle: int
) -> None:
    watch = HangDetector(board, LIMITS, USUAL)
    later = time.monotonic() + 3600
    assert watch.looks(later, {0: idle, 1: idle}) == {}
    assert watch.looks(later + 0.5, {0: idle, 1: idle}) == {}


def test_time_spent_waiting_for_another_rank_is_not_remembered_as_ones_own(
    board: Board, pulses: list[Pulse], busy: int
) -> None:
    pulses[0].phase(Phase.BACKWARD)  # rank 1 is still in its forward pass, or evaluates
    watch = HangDetector(board, LIMITS, {})
    assert minutes(watch, {0: busy, 1: busy}, 20) == []
    board.silences[0].add(int(Phase.BACKWARD), 20 * SECOND)
    board.silences[1].add(int(Phase.FORWARD), 20 * SECOND)
    seen = watch.silences()
    assert int(Phase.BACKWARD) not in seen[0] or not seen[0][int(Phase.BACKWARD)]
    assert seen[1][int(Phase.FORWARD)][silences.bucket(20 * SECOND)] == 1


def test_what_one_attempt_teaches_adds_to_what_the_journal_has() -> None:
    told = events.read({"event": "gaps", "silences": {"0": {"4": {"60": 3}}}})
    assert isinstance(told, events.SilencesMeasured)
    twice = added(added({}, told.silences), told.silences)
    assert twice == {0: {4: {60: 6}}}
