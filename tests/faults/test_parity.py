"""A script runs here as it runs elsewhere, in its first attempt and in every other."""

from __future__ import annotations

import os
import signal

import psutil

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
