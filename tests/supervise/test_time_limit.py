from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.cluster.slurm import Allocation
from autoglm_resume.events import Event
from autoglm_resume.supervise import time_limit
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.time_limit import TimeLimit
from tests.lines import line
from tests.patience import PATIENCE, soon


class Run:
    """A loop, and what a time limit does to its run."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.reached = 0
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.limit: TimeLimit | None = None

    def limited(self, job: Allocation | None, lead: float) -> TimeLimit:
        self.limit = TimeLimit(self.loop, job, lead, self._reach, self._tell)
        return self.limit

    def stopped(self, within: float = PATIENCE) -> bool:
        return self.loop.wait(lambda: self.reached > 0, time.monotonic() + within)

    def _reach(self) -> None:
        self.reached += 1

    def _tell(self, event: Event, /) -> None:
        self.told.append(line(event))


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    if made.limit is not None:
        made.limit.close()
    made.loop.close()


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that says what is in the file `answer`."""
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\nexec /bin/cat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "answer"


def until(seconds: float) -> Allocation:
    return Allocation("12", 0, "n1", time.time() + seconds)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_outside_a_scheduler_time_has_no_end(run: Run) -> None:
    limit = run.limited(None, 1.0)
    assert not run.stopped(within=0.0)
    assert not limit.near()
    assert run.told == []


@pytest.mark.usefixtures("nowhere")
def test_the_end_that_the_environment_names_is_heeded(run: Run) -> None:
    limit = run.limited(until(1.0), 0.9)
    assert run.told[0] == ("slurm", {"job": "12", "restarts": 0, "node": "n1"})
    assert run.stopped()
    assert limit.near()
    assert run.reached == 1


@pytest.mark.usefixtures("nowhere")
def test_a_short_limit_leaves_half_of_it_for_training(run: Run) -> None:
    limit = run.limited(until(1000.0), 5000.0)
    event, fields = run.told[-1]
    assert event == "time_limit"
    assert fields["lead"] == pytest.approx(500.0, abs=1.0)
    assert not limit.near()


@pytest.mark.usefixtures("nowhere")
def test_a_limit_of_a_year_can_be_waited_for(run: Run) -> None:
    run.limited(until(365 * 86400.0), 80.0)
    assert not run.stopped(within=0.01)


@pytest.mark.usefixtures("nowhere")
def test_without_slurms_commands_and_an_older_slurm_nothing_is_known(run: Run) -> None:
    limit = run.limited(Allocation("12", 0, "n1", None), 80.0)
    assert not run.stopped(within=0.01)
    assert not limit.near()


def test_slurm_is_asked_where_the_environment_says_nothing(run: Run, squeue: Path) -> None:
    squeue.write_text(f"{time.time() + 2:.0f}\n")
    run.limited(Allocation("12", 0, "n1", None), 0.5)
    assert run.stopped()
    assert [event for event, _ in run.told] == ["slurm", "time_limit"]


def test_an_end_that_was_put_off_is_not_heeded(run: Run, squeue: Path) -> None:
    squeue.write_text(f"{time.time() + 1000:.0f}\n")
    limit = run.limited(until(0.2), 0.1)
    assert run.loop.wait(lambda: not limit.near(), soon())
    assert run.reached == 0


def test_a_slurm_that_does_not_answer_is_not_waited_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\nexec /bin/sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(time_limit, "PATIENCE", 0.1)
    limit = run.limited(until(0.2), 0.1)
    assert run.stopped()
    (asking,) = limit.pids  # a child that no clean-up may end
    assert os.getpgid(asking)
    limit.close()
    assert not limit.pids


def test_a_slurm_that_cannot_answer_is_not_waited_for(run: Run, squeue: Path) -> None:
    assert not squeue.exists()
    run.limited(until(0.2), 0.1)
    assert run.stopped(within=time_limit.PATIENCE / 2)
