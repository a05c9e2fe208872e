"""Scripts without a supervisor, as processes: from whose checkpoints they go on, and with whom."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.store import Store

SCRIPT = """
import os, signal, sys
import torch
import autoglm_resume as autoglm

class Count:
    value = torch.zeros(4)
    def state_dict(self): return {"value": self.value.clone()}
    def load_state_dict(self, state): self.value = state["value"]

scale, stop = float(sys.argv[2]), os.environ.get("STOP", "")
session = autoglm.init(checkpoint_dir=os.environ.get("DIR"), every_steps=5)
count = Count()
session.track(model=torch.nn.Linear(1, 1), count=count)
start = session.resume()
print(f"rank {session.rank} starts from {start} with {count.value[0].item()}", flush=True)
for step in session.steps(12):
    count.value += scale
    if stop == f"{session.rank}:{step + 1}":
        session.step_done(step)
        session._save_for_certain()
        print("stopped", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if stop == f"hold {session.rank}:{step + 1}":
        print("holding", flush=True)
        signal.pause()
print(f"rank {session.rank} ends with {count.value[0].item()}", flush=True)
"""


class Launches:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._processes: list[subprocess.Popen[str]] = []
        (directory / "train.py").write_text(SCRIPT)

    def start(self, *args: str, **environment: str) -> subprocess.Popen[str]:
        """One process: alone, or a rank as `srun` and `mpirun` start them."""
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            [sys.executable, "train.py", *(args or ("--scale", "1"))],
            cwd=self.directory,
            env={**clean, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def ranks(self, *args: str, **environment: str) -> list[subprocess.Popen[str]]:
        return [self.start(*args, RANK=rank, WORLD_SIZE="2", **environment) for rank in "01"]

    def run(self, *args: str, **environment: str) -> tuple[int, str, str]:
        return ended(self.start(*args, **environment))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate()
    return process.returncode, out, error


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(ended(process))


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    found = Launches(tmp_path)
    yield found
    found.end()


def test_a_sweep_does_not_go_on_from_what_other_arguments_made(launches: Launches) -> None:
    assert launches.run("--scale", "1")[0] == 0
    before = sorted(launches.directory.rglob("step-*"))
    code, out, error = launches.run("--scale", "10")
    assert code
    assert "starts" not in out
    assert "train.py --scale 1; found train.py --scale 10: --scale: 1 then, 10 now" in error
    for way in ("name this one to go on there: autoglm.init(checkpoint_dir=…)", "move"):
        assert way in error
    assert sorted(launches.directory.rglob("step-*")) == before
    other = launches.run("--scale", "10", DIR="other")
    assert other[:2] == (0, "rank 0 starts from 0 with 0.0\nrank 0 ends with 120.0\n")


def test_what_is_gone_on_from_is_always_said_and_other_arguments_may_where_it_is_named(
    launches: Launches,
) -> None:
    stopped = launches.run("--scale", "1", STOP="0:5", DIR="ckpt")
    assert stopped[0] == -signal.SIGKILL
    code, out, error = launches.run("--scale", "10", DIR="ckpt")
    assert (code, out) == (0, "rank 0 starts from 5 with 5.0\nrank 0 ends with 75.0\n")
    said = (
        r"going on from step 5, checkpoint step-0000000005\.x\w+, made 20.* by train\.py --scale 1"
    )
    assert re.search(said + "; with other arguments now: --scale: 1 then, 10 now", error)
    (launches.directory / "train.py").write_text(SCRIPT + "\n# edited\n")
    code, out, error = launches.run("--scale", "10", DIR="ckpt")
    assert code == 0, "these are the arguments of the newest"
    assert re.search(r"step 12, .* by train.py --scale 10; the script has been edited since", error)
    assert "nothing to train" in error
    assert "holds step 12 of 12 already" in error
    code, out, error = launches.run("--scale", "100", DIR="ckpt")
    assert code, "nothing is left to train, and another command made what is there"
    assert "made by another command: --scale: 10 then, 100 now" in error


def test_two_at_a_time_do_not_delete_each_others(launches: Launches) -> None:
    first = launches.start(STOP="hold 0:7")
    wait_for(first, "holding")
    code, _, error = launches.run()
    assert code
    assert f"another launch trains with these checkpoints: process {first.pid} on" in error
    first.kill()
    first.wait()
    assert launches.run()[:2] == (0, "rank 0 starts from 5 with 5.0\nrank 0 ends with 12.0\n")


def test_ranks_without_a_store_agree_and_never_take_a_part_of_another_launch(
    launches: Launches,
) -> None:
    # As under a launcher with a fixed port and no process group: nothing tells launches apart.
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777", "DIR": "ckpt"}
    first = launches.ranks("--scale", "1", STOP="0:5", **same)
    assert [ended(rank)[0] for rank in first] == [-signal.SIGKILL, 0]
    second = launches.ranks("--scale", "10", STOP="1:10", **same)
    outs = [ended(rank) for rank in second]
    assert all("starts from 5 with 5.0" in out for _, out, _ in outs), outs
    third = launches.ranks("--scale", "100", **same)
    outs = [ended(rank) for rank in third]
    assert all("starts from 10 with 55.0" in out for _, out, _ in outs), outs
    assert all("ends with 255.0" in out for _, out, _ in outs), outs
    store = Store(launches.directory / "ckpt")
    tokens = {path.name: path.name.partition(".")[2] for path in store.committed()}
    assert len(set(tokens.values())) == len({name[:15] for name in tokens}), tokens


def test_of_two_launches_at_once_one_trains(launches: Launches) -> None:
    one = launches.ranks(STOP="hold 0:7", MASTER_PORT="1")
    wait_for(one[0], "holding")
    late = launches.start(RANK="0", WORLD_SIZE="2", MASTER_PORT="2")
    code, _, error = ended(late)
    assert code
    assert f"process {one[0].pid} on" in error
    one[0].kill()
    assert ended(one[1])[0] == 0


LOST = """
import atexit, pathlib, sys
import torch
atexit.register(print, "before")
import autoglm_resume as autoglm

session = autoglm.init(checkpoint_dir="ckpt", every_steps=100)
session.track(model=torch.nn.Linear(1, 1))
for step in range(session.resume(), 3):
    session.step_done(step)
atexit.register(print, "later")
if sys.argv[1:] == ["lose"]:
    pathlib.Path("ckpt").rename("away")
    pathlib.Path("ckpt").write_text("a file is in the way")
session.save()
"""


def test_a_script_whose_last_save_fails_does_not_end_well(launches: Launches) -> None:
    (launches.directory / "train.py").write_text(LOST)
    assert launches.run("lose")[:2] == (1, "later\n")
    (launches.directory / "ckpt").unlink()
    assert launches.run("keep")[:2] == (0, "later\nbefore\n")


def test_what_is_refused_is_told_in_a_sentence_with_what_to_do_below_it(
    launches: Launches,
) -> None:
    (launches.directory / "train.py").write_text(REFUSED)
    code, _, error = launches.run("uncaught")
    assert code == 2
    first, second = error.splitlines()
    assert first.startswith("autoglm: error: session.track(number=…): int has no state_dict()")
    assert first.endswith("(train.py:8)")
    assert second.startswith("autoglm: hint: ")
    assert launches.run("caught")[:2] == (0, "caught\n")
    code, _, error = launches.run("another")
    assert (code, error.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    code, _, error = launches.run("own")
    assert (code, "Traceback" in error) == (1, True), "not ours: the script raised it"


REFUSED = """
import sys
import autoglm_resume as autoglm
from autoglm_resume.errors import UsageError

session = autoglm.init(checkpoint_dir="ckpt")
def track():
    session.track(number=7)
try:
    if sys.argv[1] == "another": 1 / 0
    if sys.argv[1] == "own": raise UsageError("mine")
    track()
except UsageError:
    if sys.argv[1] != "caught": raise
    print("caught")
"""
