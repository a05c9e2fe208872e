"""A script runs here as it runs elsewhere, in its first attempt and in every other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.faults.conftest import Rehearsal, all_dead

LEAVES = """
import atexit, os, subprocess, sys, time

def flush():
    time.sleep(0.5)
    open("flushed-" + os.environ["RANK"], "w").write("all")

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt == 0 and os.environ["RANK"] == "1":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open("left-by-a-failure", "w").write(str(left.pid))
    atexit.register(flush)
    kept = open("buffered", "w")
    kept.write("flushed when the interpreter ends")
    sys.exit(3)
if attempt == 0:
    time.sleep(600)
if os.environ["RANK"] == "1":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open("left-on-purpose", "w").write(str(left.pid))
"""


def test_what_a_script_leaves_to_its_exit_is_done_and_what_it_leaves_running_runs_on(
    rehearsal: Rehearsal,
) -> None:
    script = rehearsal.directory / "leaves.py"
    script.write_text(LEAVES)
    finished = rehearsal.run(script=str(script))
    assert finished.code == 0, finished
    assert "rank 1 exited with code 3" in finished.err
    assert (rehearsal.directory / "flushed-1").read_text() == "all"
    assert (rehearsal.directory / "buffered").read_text() == "flushed when the interpreter ends"
    failed, purpose = (
        int((rehearsal.directory / f"left-{how}").read_text())
        for how in ("by-a-failure", "on-purpose")
    )
    assert not psutil.pid_exists(failed)
    left = psutil.Process(purpose)
    assert left.is_running()
    os.kill(purpose, signal.SIGKILL)
    assert all_dead([left])


HUB = """
import os
HOME, OFFLINE = os.environ.get("HUB_HOME"), os.environ.get("HUB_OFFLINE")
assert OFFLINE, "it would wait for a network"
"""
SETS = """
import os, sys
os.environ["HUB_HOME"], os.environ["HUB_OFFLINE"] = "/scratch", "1"
import hub, users_of_hub, datasets_of_mine
import torch
import autoglm_resume as autoglm
print("attempt", hub.HOME, hub.OFFLINE, users_of_hub.HOME, datasets_of_mine.NAME, flush=True)
session = autoglm.init()
session.track(model=torch.nn.Linear(2, 1))
for step in session.steps(20):
    if step == 10 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
"""


def test_a_restart_imports_what_the_first_attempt_did(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = rehearsal.directory / "lib" / "site-packages"
    site.mkdir(parents=True)
    (site / "hub.py").write_text(HUB)
    (site / "users_of_hub.py").write_text("from hub import HOME\nimport datasets_of_mine")
    (site / "datasets_of_mine.py").write_text("NAME = 'installed'")
    (rehearsal.directory / "datasets_of_mine.py").write_text("NAME = 'of the project'")
    (script := rehearsal.directory / "sets.py").write_text(SETS)
    places = (str(site), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(place for place in places if place))
    finished = rehearsal.run(script=str(script), nproc_per_node=1)
    assert finished.code == 0, finished
    said = [line for line in finished.out.splitlines() if "attempt" in line and "/scratch" in line]
    assert len(said) == 2
    assert {line.partition("attempt ")[2] for line in said} == {
        "/scratch 1 /scratch of the project"
    }
    assert not rehearsal.events("zygote_lost")


THREADS = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "2"
import torch
print("threads", torch.get_num_threads(), flush=True)
sys.exit(3 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
"""


def test_threads_that_a_script_asks_for_before_it_imports_torch_it_gets(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script := rehearsal.directory / "threads.py").write_text(THREADS)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    alone = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    finished = rehearsal.run(script=str(script), env={"OMP_NUM_THREADS": "1"}, nproc_per_node=1)
    assert finished.code == 0, finished
    assert finished.out.count(alone.stdout) == 2
    (over,) = rehearsal.events("started_over")
    assert over["reason"] == "the script sets OMP_NUM_THREADS before it imports torch"
    assert over["reason"] in finished.err
    assert rehearsal.events("cold_start")


@pytest.mark.thorough
def test_what_a_script_changes_too_late_to_start_over_is_right_in_the_next_attempt(
    rehearsal: Rehearsal,
) -> None:
    (script := rehearsal.directory / "late.py").write_text(
        "import os, torch\nimport torch.distributed as dist\n"
        'dist.init_process_group("gloo")\n'
        'os.environ["TORCHDYNAMO_VERBOSE"] = "1"\n'
        "import torch._dynamo\n"
        'print("verbose", torch._dynamo.config.verbose, flush=True)\n'
        "dist.barrier()\n"
    )
    finished = rehearsal.run(script=str(script))
    assert finished.code == 0, finished
    assert len(rehearsal.events("attempt_started")) == 2
    assert finished.out.count("verbose True") == 2
    reason = "the script sets TORCHDYNAMO_VERBOSE before it imports torch._dynamo"
    assert reason in rehearsal.events("failure")[0]["summary"]
