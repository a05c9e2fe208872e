from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from autoglm_resume.protocol.heartbeats import Board, Control
from autoglm_resume.worker.requests import Due, FromClock, FromRankZero, FromSupervisor


def test_a_save_and_a_stop_are_due_at_exactly_the_announced_step() -> None:
    board, fd = Board.create(2)
    requests = FromSupervisor(board.pulse(1), 1)
    assert requests.at(0) == Due(False, False)
    board.ask(Control(save_at=5, stop_at=7))
    due = [requests.at(step) for step in range(4, 9)]
    nothing, save, stop = Due(), Due(save=True), Due(stop=True)
    assert due == [nothing, save, nothing, stop, nothing]
    board.ask(Control(save_at=9, stop_at=9))
    assert requests.at(9) == Due(True, True)
    board.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("control", "rank", "codes"),
    [
        (Control(exit_rank=1, exit_at=3, exit_code=7), 1, {2: 0, 3: 7, 4: 7}),
        (Control(exit_rank=1, exit_at=3, exit_code=7), 0, {3: 0, 4: 0}),
        (Control(), 0, {0: 0, 3: 0}),
    ],
)
def test_the_drilled_rank_exits_and_no_other(
    control: Control, rank: int, codes: dict[int, int]
) -> None:
    board, fd = Board.create(2)
    board.ask(control)
    for step, code in codes.items():
        child = os.fork()
        if child == 0:
            FromSupervisor(board.pulse(rank), rank).at(step)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    board.close()
    os.close(fd)


def test_alone_the_clock_decides() -> None:
    never = FromClock(None)
    assert not any(never.at(step).save for step in range(100))
    clock = FromClock(0.05)
    assert not clock.at(1).save
    saves = [time.monotonic()]
    while len(saves) < 4:
        if clock.at(2).save:
            saves.append(time.monotonic())
    gaps = [after - before for before, after in itertools.pairwise(saves)]
    assert all(0.04 < gap < 5 for gap in gaps)


STEP = 0.1


def steady(rank: int, requests: FromRankZero) -> list[int]:
    """Steps of equal length, with a collective at the end of each, as training has."""
    for step in range(1, 60):
        time.sleep(STEP)
        dist.barrier()
        if requests.at(step).save:
            return [step]
    return []


def uneven(rank: int, requests: FromRankZero) -> list[int]:
    """One slow step and then quick ones: a compilation, an evaluation, a slow save."""
    saves = []
    time.sleep(2 * STEP)
    for turn in (1, 0):  # rank 0 announces just after the others have looked
        if rank == turn and requests.at(1).save:
            saves.append(1)
        dist.barrier()
    for step in range(2, 40):
        dist.barrier()
        if requests.at(step).save:
            saves.append(step)
    return saves


def two(tmp_path: Path, train: Callable[[int, FromRankZero], list[int]]) -> list[list[int]]:
    """The steps at which two real gloo processes would save."""
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                store = dist.FileStore(str(tmp_path / "store"), 2)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
                requests = FromRankZero(rank, every_seconds=0.15)
                # The real ones are four times as long, in the same proportion.
                requests.CHECK_SECONDS, requests.AHEAD = 0.12, 0.75
                saves = train(rank, requests)
                (tmp_path / str(rank)).write_text(json.dumps(saves))
                dist.barrier()
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]


def test_two_ranks_without_a_supervisor_agree_on_the_step(tmp_path: Path) -> None:
    saves = two(tmp_path, steady)
    assert saves[0], "rank 0 announced one"
    assert saves[0] == saves[1]


def test_they_agree_after_one_slow_step_too(tmp_path: Path) -> None:
    saves = two(tmp_path, uneven)
    assert saves[0] == saves[1]
