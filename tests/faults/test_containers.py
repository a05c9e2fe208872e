"""The supervisor as the first process of a container: a real PID namespace."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from typing import Any

import psutil
import pytest

from tests.faults.conftest import Rehearsal, finish
from tests.patience import soon

CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare and nsenter here")
    done = subprocess.run([*CONTAINER, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no PID namespace here: {done.stderr.strip()}")


def start(rehearsal: Rehearsal, *args: str, **more: Any) -> psutil.Process:
    """`autoglm run` in a container, begun; returns its first process."""
    rehearsal.around = CONTAINER
    outside = rehearsal.start(*args, **more)
    rehearsal.around = ()
    rehearsal.wait_for("first_step")
    assert rehearsal.events("supervisor_started")[0]["pid"] == 1
    (first,) = psutil.Process(outside.pid).children()
    return first


def sleepers(first: psutil.Process, seconds: str) -> list[psutil.Process]:
    """What sleeps so long in the container."""
    return [p for p in first.children(recursive=True) if _command(p) == ["sleep", seconds]]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_sigterm_saves_and_the_run_goes_on_elsewhere_exactly(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    first = start(rehearsal, "--pause", "0.04", hold=("0:0:20",))
    rehearsal.stop(20, first)
    stopped = finish(rehearsal.processes[-1])
    assert stopped.code == 75, stopped
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert rehearsal.final() == undisturbed


def test_orphans_of_the_run_are_ended_and_those_of_others_are_left_alone(
    rehearsal: Rehearsal,
) -> None:
    words = ("--fail", "daemon", "--pause", "0.04")
    holds = ("0:1:20", "1:0:30")
    first = start(rehearsal, *words, drill=("kill:rank=1,step=20",), hold=holds)
    begun = {p.pid for p in sleepers(first, "1234.5")}
    assert len(begun) == 2
    inside = ["nsenter", "--target", str(first.pid), "--pid", "--mount"]
    leave = "sleep 4321.5 >/dev/null 2>&1 & until grep -q ^sleep /proc/$!/cmdline; do :; done"
    subprocess.run([*inside, "sh", "-c", leave], check=True)
    (foreign,) = sleepers(first, "4321.5")
    assert foreign.ppid() == first.pid
    rehearsal.release(20)
    rehearsal.wait_for("first_step", lambda e: e["attempt"] == 1)
    assert not begun & {p.pid for p in sleepers(first, "1234.5")}
    assert foreign.is_running()
    foreign.kill()
    rehearsal.stop(30, first)
    assert finish(rehearsal.processes[-1]).code == 75


def test_a_rank_that_leaks_processes_leaves_no_zombies(rehearsal: Rehearsal) -> None:
    first = start(rehearsal, "--fail", "leak", "--steps", "10000", "--pause", "0.01")
    rehearsal.wait_for("committed", lambda e: e["step"] > 12)
    deadline = soon()
    while zombies(first) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert zombies(first) == []
    first.send_signal(signal.SIGTERM)
    assert finish(rehearsal.processes[-1]).code == 75


def zombies(first: psutil.Process) -> list[psutil.Process]:
    return [p for p in first.children() if p.status() == psutil.STATUS_ZOMBIE]
