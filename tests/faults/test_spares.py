"""Warm spares in real runs: they take over, give the same result, and never harm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Finished, Rehearsal, finish
from tests.thorough import thorough

SPLIT = """
import os, sys, time
import torch
import torch.distributed as dist
import autoglm_resume as autoglm
import parts
from holding import hold
{top}

def setup():
    torch.manual_seed(3)
    model = parts.model()
    {setup}
    return model, torch.optim.SGD(model.parameters(), lr=0.01)

def train(ready):
    model, optimizer = ready
    dist.init_process_group("gloo")
    session = autoglm.init()
    session.track(model=model, optimizer=optimizer)
    for step in session.steps(int(sys.argv[1])):
        hold(session.rank, step)
        loss = model(torch.randn(4, 8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.01)
    print("version", parts.VERSION, flush=True)
    dist.destroy_process_group()

{end}
"""
PARTS = """
import torch
VERSION = 1
def model():
    return torch.nn.Linear(8, 8)
"""
LAUNCH = "autoglm.launch(setup, train)"


class Split:
    """A run of a script that is split, whose spares are ready once it trains."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        self.parts = rehearsal.directory / "parts.py"
        self.parts.write_text(PARTS)
        holding = Path(__file__).with_name("holding.py").read_text()
        (rehearsal.directory / "holding.py").write_text(holding)

    def write(self, end: str = LAUNCH, top: str = "", setup: str = "pass") -> Path:
        script = self.rehearsal.directory / "split.py"
        script.write_text(SPLIT.format(end=end, top=top, setup=setup))
        return script

    def start(self, script: Path, steps: int = 40, spares: int = 2):  # type: ignore[no-untyped-def]
        held = ("0:0:39",) if spares else ()
        return self.rehearsal.start(str(steps), script=str(script), spares=spares, hold=held)

    def spares(self, count: int = 2) -> list[int]:
        """Process ids, once so many are ready."""
        ready: list[int] = []

        def enough(event: dict[str, object]) -> bool:
            if event["pid"] not in ready:
                ready.append(int(str(event["pid"])))
            return len(ready) >= count

        self.rehearsal.wait_for("spare_ready", enough)
        return ready

    def kill_rank(self) -> None:
        os.kill(self.rehearsal.events("attempt_started")[-1]["pids"]["1"], signal.SIGKILL)

    def pids_of_restart(self) -> set[int]:
        started = self.rehearsal.wait_for("attempt_started", lambda e: e["attempt"] == 1)
        return set(started["pids"].values())


@pytest.fixture
def split(rehearsal: Rehearsal) -> Split:
    return Split(rehearsal)


def ok(finished: Finished) -> None:
    assert finished.code == 0, finished


@pytest.mark.parametrize("end", [LAUNCH, *thorough("train(setup())")])
def test_spares_become_the_ranks_after_a_failure_with_the_same_result(
    split: Split, end: str
) -> None:
    script = split.write(end)
    process = split.start(script)
    spares = split.spares()
    split.kill_rank()
    assert split.pids_of_restart() == set(spares)
    ok(finish(process))
    disturbed = split.rehearsal.final()
    split.rehearsal.job["run_dir"] = "undisturbed"
    split.rehearsal.run_dir = split.rehearsal.directory / "undisturbed"
    ok(finish(split.start(script, spares=0)))
    assert split.rehearsal.final() == disturbed


def test_one_spare_for_two_ranks_takes_the_place_of_one(split: Split) -> None:
    process = split.start(split.write(), spares=1)
    [spare] = split.spares(1)
    split.kill_rank()
    pids = split.pids_of_restart()
    assert spare in pids
    assert len(pids) == 2
    ok(finish(process))


def test_a_spare_that_has_read_a_file_that_was_edited_since_is_not_used(split: Split) -> None:
    process = split.start(split.write())
    spares = split.spares()
    split.parts.write_text(PARTS.replace("VERSION = 1", "VERSION = 20"))
    split.kill_rank()
    assert not split.pids_of_restart() & set(spares)
    ok(finish(process))
    assert split.parts.name in split.rehearsal.events("spare_dropped")[0]["reason"]
    log = split.rehearsal.run_dir / "attempts" / "001" / "rank-0.log"
    assert "version 20" in log.read_text()


def test_a_spare_that_dies_is_missed_by_nobody(split: Split) -> None:
    process = split.start(split.write())
    spares = split.spares()
    os.kill(spares[0], signal.SIGKILL)
    split.rehearsal.wait_for("spare_failed")
    split.kill_rank()
    assert spares[1] in split.pids_of_restart()
    ok(finish(process))


@pytest.mark.parametrize(
    ("top", "setup", "reason"),
    [
        ("", 'os.environ["RANK"]', "KeyError: 'RANK'"),
        ('rank = os.environ["LOCAL_RANK"]', "pass", "KeyError: 'LOCAL_RANK'"),
        ("parts.RANK = os.getenv('RANK', '-1')", "pass", "RANK was asked for before"),
        ("", "autoglm.init() if 'RANK' not in os.environ else None", "must come in train()"),
        ("", "sys.exit() if 'RANK' not in os.environ else None", "without calling autoglm.launch"),
    ],
)
def test_a_script_that_cannot_be_prepared_says_why_and_is_forked_as_ever(
    split: Split, top: str, setup: str, reason: str
) -> None:
    process = split.start(split.write(top=top, setup=setup))
    failed = split.rehearsal.wait_for("spare_failed")
    assert reason in failed["reason"]
    split.kill_rank()
    ok(finish(process))
    assert len(split.rehearsal.events("spare_failed")) == 2  # and no more are tried


def test_spares_end_with_their_run(split: Split) -> None:
    process = split.start(split.write(), steps=1000)
    spares = split.spares()
    split.rehearsal.stop(40, process)
    assert finish(process).code == 75
    assert not any(Path(f"/proc/{pid}").exists() for pid in spares)
