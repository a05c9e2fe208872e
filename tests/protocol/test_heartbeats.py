from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.protocol.heartbeats import NEVER, Beat, Board, Control, Phase

Fork = Callable[[Callable[[], object]], int]

COPY = 64
HEADER = 64
RECORD = 2 * COPY


@pytest.fixture
def board() -> Iterator[tuple[Board, int]]:
    made, fd = Board.create(3)
    yield made, fd
    made.close()
    os.close(fd)


@pytest.fixture
def fork() -> Iterator[Fork]:
    """`fork(work)`: pid of a child that does `work`; none outlives the test."""
    children: list[int] = []

    def start(work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        children.append(pid)
        return pid

    yield start
    for pid in children:
        with contextlib.suppress(ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def raw(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, 0)


def record(rank: int) -> int:
    """Where the record of `rank` begins; those of control and decision are before rank 0."""
    return HEADER + RECORD * (2 + rank)


def test_nobody_has_beaten_and_nothing_is_asked_at_first(board: tuple[Board, int]) -> None:
    assert board[0].beats() == (NEVER,) * 3
    assert board[0].control() == Control()


def test_a_beat_carries_everything(board: tuple[Board, int]) -> None:
    pulse = board[0].pulse(1)
    pulse.phase(Phase.START)
    assert board[0].beat(1).step == -1
    pulse.at(30)
    assert (board[0].beat(1).step, board[0].beat(1).first_step_time) == (30, 0)
    pulse.report(0.5, None)
    pulse.report(None, 2.5)
    before = time.monotonic_ns()
    pulse.completed(31)
    first = board[0].beat(1)
    assert first.first_step_time == first.time
    assert before <= first.time <= time.monotonic_ns()
    pulse.completed(32)
    pulse.phase(Phase.SAVE)
    beat = board[0].beat(1)
    assert beat == Beat(
        os.getpid(), Phase.SAVE, 32, beat.time, first.first_step_time, loss=0.5, grad_norm=2.5
    )
    assert beat.time >= first.time
    assert board[0].beat(0) is NEVER
    assert board[0].beat(2) is NEVER


@given(
    st.builds(
        Control,
        **dict.fromkeys(("save_at", "stop_at", "exit_rank", "exit_at"), st.integers(-1, 2**62)),
        exit_code=st.integers(0, 255),
    )
)
def test_any_request_arrives_as_it_was_asked(control: Control) -> None:
    made, fd = Board.create(1)
    made.ask(Control(1, 2, 3, 4, 5))
    made.ask(control)
    assert made.pulse(0).control() == control
    made.close()
    os.close(fd)


def test_others_open_it_through_its_owners_descriptor(board: tuple[Board, int], fork: Fork) -> None:
    path = Path(f"/proc/{os.getpid()}/fd/{board[1]}")

    def rank() -> None:
        os.close(board[1])
        other = Board.open(path)
        assert other.world_size == 3
        other.pulse(2).completed(7)
        while other.control().stop_at != 9:
            pass
        other.pulse(2).completed(8)

    child = fork(rank)
    while board[0].beat(2).step != 7:
        pass
    assert board[0].beat(2).pid == child
    board[0].ask(Control(stop_at=9))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert board[0].beat(2).step == 8, "a rank that is opened twice goes on with its sequence"


@pytest.mark.parametrize("content", [b"", b"x" * 4096])
def test_what_is_no_board_is_not_opened(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        Board.open(tmp_path / "x")
    with pytest.raises(OSError, match="No such file"):
        Board.open(tmp_path / "none")


def test_a_short_file_is_not_a_board_either(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"short")
    with pytest.raises((OSError, ValueError)):
        Board.open(tmp_path / "x")


def hammer(board: Board, rank: int) -> None:
    """Beat in a tight loop; every field of a beat follows from its step."""
    pulse = board.pulse(rank)
    step = 0
    while True:
        step += 1
        pulse.report(float(step * 2), step / 2)
        pulse.completed(step)


def consistent(beat: Beat, pid: int) -> bool:
    return (
        beat.pid == pid
        and beat.loss == beat.step * 2
        and beat.grad_norm == beat.step / 2
        and beat.phase is Phase.DATA
        and 0 < beat.first_step_time <= beat.time
    )


def test_no_read_is_ever_torn_and_the_last_beat_survives_sigkill(
    board: tuple[Board, int], fork: Fork
) -> None:
    for rank in range(3):
        child = fork(functools.partial(hammer, board[0], rank))
        while board[0].beat(rank) is NEVER:
            pass
        last = 0
        until = time.monotonic() + 0.4
        reads = 0
        while time.monotonic() < until or reads <= 100:
            beat = board[0].beat(rank)
            assert consistent(beat, child), beat
            assert beat.step >= last, "a beat never goes back"
            last, reads = beat.step, reads + 1
        end(child)
        dead = board[0].beat(rank)
        assert consistent(dead, child)
        assert dead.step >= last
        assert board[0].beat(rank) == dead
    assert len({beat.pid for beat in board[0].beats()}) == 3


def test_a_writer_killed_at_any_instant_leaves_a_beat_that_is_whole(fork: Fork) -> None:
    for delay in range(40):
        made, fd = Board.create(1)
        child = fork(functools.partial(hammer, made, 0))
        while made.beat(0).step < 50 + 7 * delay:
            pass
        end(child)
        dead = made.beat(0)
        assert consistent(dead, child)
        Board.open(Path(f"/proc/{os.getpid()}/fd/{fd}")).pulse(0).completed(1)
        assert made.beat(0).step == 1, "who writes next is read next"
        made.close()
        os.close(fd)


@pytest.mark.parametrize("damage", range(64))
def test_damage_to_the_newest_copy_falls_back_to_the_other(
    board: tuple[Board, int], damage: int
) -> None:
    pulse = board[0].pulse(0)
    pulse.completed(1)
    pulse.completed(2)
    memory = raw(board[1])
    start = record(0)
    # Sequence 2 is in copy 0, sequence 1 in copy 1.
    sequences = struct.unpack_from("<Q", memory, start) + struct.unpack_from(
        "<Q", memory, start + COPY
    )
    assert sequences == (2, 1)
    memory[start + damage] ^= 0xFF
    used = struct.calcsize("<QIHHqqqdd") + 4
    assert board[0].beat(0).step == (1 if damage < used else 2)
    memory.close()
    pulse.completed(3)
    assert board[0].beat(0).step == 3


def test_with_both_copies_damaged_there_is_no_beat(board: tuple[Board, int]) -> None:
    pulse = board[0].pulse(0)
    pulse.completed(1)
    pulse.completed(2)
    memory = raw(board[1])
    for copy in (0, COPY):
        memory[record(0) + copy + 20] ^= 1
    memory.close()
    assert board[0].beat(0) is NEVER
    assert board[0].beat(1) is NEVER


def test_loss_may_be_anything(board: tuple[Board, int]) -> None:
    pulse = board[0].pulse(0)
    pulse.report(math.nan, -math.inf)
    pulse.completed(1)
    beat = board[0].beat(0)
    assert math.isnan(beat.loss)
    assert beat.grad_norm == -math.inf


def test_nothing_is_left_when_the_owner_is_dead(fork: Fork) -> None:
    told, tell = os.pipe()

    def own() -> None:
        _, fd = Board.create(1)
        os.write(tell, str(fd).encode())
        signal.pause()

    owner = fork(own)
    path = Path(f"/proc/{owner}/fd/{os.read(told, 9).decode()}")
    kept = Board.open(path)
    end(owner)
    os.close(told)
    os.close(tell)
    kept.pulse(0).completed(5)
    assert kept.beat(0).step == 5, "a rank that has it open beats on"
    with pytest.raises(OSError, match="No such file"):
        Board.open(path)
    kept.close()


# Whether all save


def opened(fd: int) -> Board:
    """As another process has it, with a lock of its own."""
    return Board.open(Path(f"/proc/{os.getpid()}/fd/{fd}"))


def test_whoever_still_saves_when_the_first_one_asks_decides_for_all(
    board: tuple[Board, int],
) -> None:
    pulses = [board[0].pulse(rank) for rank in range(3)]
    assert all(pulse.agree(5) for pulse in pulses), "nobody saves"
    pulses[1].saving(True)
    pulses[1].alive()
    assert board[0].beat(1).saving
    assert [pulse.agree(6) for pulse in pulses] == [False] * 3
    pulses[1].saving(False)
    assert [pulse.agree(6) for pulse in pulses] == [False] * 3, "it was decided"
    assert [pulse.agree(7) for pulse in pulses] == [True] * 3
    pulses[2].saving(True)
    assert [pulse.agree(7) for pulse in pulses] == [True] * 3, "it was decided"
    assert [pulse.agree(8) for pulse in (pulses[2], *pulses)] == [False] * 4, "its own counts"


def test_ranks_that_ask_at_the_same_instant_get_the_same_answer(
    board: tuple[Board, int], fork: Fork, tmp_path: Path
) -> None:
    steps, ranks = 150, 3
    gates = [os.pipe() for _ in range(ranks)]
    done, tell = os.pipe()
    path = Path(f"/proc/{os.getpid()}/fd/{board[1]}")

    def rank(number: int) -> None:
        pulse = Board.open(path).pulse(number)
        answers = ""
        for step in range(steps):
            os.read(gates[number][0], 1)  # no rank is more than a step ahead of another
            pulse.saving((step * 7 + number * 3) % 4 == 0)
            answers += str(int(pulse.agree(step)))
            os.write(tell, b".")
        (tmp_path / str(number)).write_text(answers)
        os.write(tell, b".")

    for number in range(ranks):
        fork(functools.partial(rank, number))
    for _ in range(steps + 1):
        for _, gate in gates:
            os.write(gate, b".")
        for _ in range(ranks):
            os.read(done, 1)
    answers = {(tmp_path / str(number)).read_text() for number in range(ranks)}
    assert len(answers) == 1
    assert set(answers.pop()) == {"0", "1"}
    for fd in (done, tell, *(fd for gate in gates for fd in gate)):
        os.close(fd)


def test_a_rank_that_is_killed_while_it_decides_leaves_the_decision_to_the_others(
    board: tuple[Board, int], fork: Fork
) -> None:
    told, tell = os.pipe()
    path = Path(f"/proc/{os.getpid()}/fd/{board[1]}")

    class Slow(Board):
        def beats(self) -> tuple[Beat, ...]:
            os.write(tell, b".")
            signal.pause()
            return ()

    killed = fork(lambda: Slow.open(path).pulse(0).agree(5))
    os.read(told, 1)
    other = opened(board[1])
    with pytest.raises(BlockingIOError):
        fcntl.flock(other._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    end(killed)
    assert other.pulse(1).agree(5)
    other.close()
    os.close(told)
    os.close(tell)
