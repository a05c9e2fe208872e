from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.errors import AutoglmError
from autoglm_resume.worker import meeting
from autoglm_resume.worker.meeting import InFiles, Meeting, launch_of


class Ranks:
    """Ranks of launches, each on a thread of its own."""

    def __init__(self, directory: Path, world_size: int = 3) -> None:
        self.board = InFiles(directory)
        self.world_size = world_size
        self.heard: list[list[str]] = []
        self.answers: dict[str, str] = {}
        self._threads: list[threading.Thread] = []

    def lead(self, name: str) -> None:
        def run() -> None:
            here = Meeting(self.board, 0, self.world_size)
            self.heard.append(here.gather(name))
            here.answer(f"from {name}")

        self._start(run)

    def follow(self, rank: int, name: str) -> None:
        def run() -> None:
            self.answers[name] = Meeting(self.board, rank, self.world_size).ask(name)

        self._start(run)

    def _start(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()


@pytest.mark.parametrize("first", ["rank 0", "the others"])
def test_the_ranks_of_every_launch_agree_whoever_comes_first(tmp_path: Path, first: str) -> None:
    ranks = Ranks(tmp_path / "meeting")
    for launch in ("a", "b", "c"):
        # What the launch before has left is there.
        if first == "rank 0":
            ranks.lead(f"{launch}0")
        for rank in (1, 2):
            ranks.follow(rank, f"{launch}{rank}")
        if first != "rank 0":
            ranks.lead(f"{launch}0")
        ranks.join()
        assert ranks.heard[-1] == [f"{launch}0", f"{launch}1", f"{launch}2"]
        assert ranks.answers[f"{launch}1"] == ranks.answers[f"{launch}2"] == f"from {launch}0"


def test_a_rank_of_a_launch_that_was_given_up_is_not_heard_in_the_next(tmp_path: Path) -> None:
    board = InFiles(tmp_path)
    dead = Meeting(board, 0, 2)
    dead._set("call", word="of a rank 0 that died")
    board.set("rank 1", '{"launch": "", "call": "of a rank 0 that died", "word": "w", "said": "x"}')
    ranks = Ranks(tmp_path, world_size=2)
    ranks.follow(1, "new 1")  # which answers the dead one first
    ranks.lead("new 0")
    ranks.join()
    assert ranks.heard == [["new 0", "new 1"]]


def test_a_rank_that_comes_back_alone_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "GRACE", 0.0)
    ranks = Ranks(tmp_path, world_size=2)
    ranks.lead("0")
    ranks.follow(1, "1")
    ranks.join()
    back = Meeting(ranks.board, 1, 2, lambda: "rank 0 trains without you")
    with pytest.raises(AutoglmError, match="rank 0 trains without you"):
        back.ask("1")


def test_ranks_of_another_launch_are_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "FIRST", 0.1)
    monkeypatch.setenv("MASTER_PORT", "1")
    here = Meeting(InFiles(tmp_path), 0, 2)
    monkeypatch.setenv("MASTER_PORT", "2")
    other = Meeting(InFiles(tmp_path), 1, 2)
    here._set("call", word="here")
    with pytest.raises(AutoglmError, match=r"rank 1 waits for rank 0, in .*: nothing came"):
        other.ask("other")
    with pytest.raises(AutoglmError, match="rank 0 waits for rank 1"):
        here.gather("here")


def test_parts_of_a_heterogeneous_job_are_one_launch() -> None:
    job = {"MASTER_ADDR": "a", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert launch_of(job) != launch_of({**job, "SLURM_JOB_ID": "8"})
    parts = [{**job, "SLURM_JOB_ID": id, "SLURM_HET_SIZE": "2"} for id in ("7", "8")]
    assert launch_of(parts[0]) == launch_of(parts[1])
    assert launch_of({}) == ""
