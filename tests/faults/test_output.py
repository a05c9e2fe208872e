"""A run whose output has nowhere to go: it trains, saves and ends as any other."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Rehearsal, finish
from tests.thorough import thorough

ON_A_TERMINAL = """
import os, pty, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
pid, terminal = pty.fork()
if pid == 0:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs these tests under nohup
    os.execvp(sys.argv[1], sys.argv[1:])
signal.sigwait([signal.SIGUSR1])
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
"""Runs a command on a terminal, which closes on SIGUSR1."""


def around(redirections: str) -> tuple[str, ...]:
    return ("bash", "-c", f'exec "$0" "$@" {redirections}')


@pytest.mark.parametrize("fate", ["<&- >&- 2>&-", *thorough(">/dev/full")])
def test_a_stop_exits_75_and_a_run_0_though_nothing_can_be_printed(
    rehearsal: Rehearsal, undisturbed: dict[str, str], fate: str
) -> None:
    rehearsal.around = around(fate)
    process = rehearsal.start("--pause", "0.04", hold=("0:0:10",))
    rehearsal.wait_for("first_step")
    rehearsal.stop(10, process)
    stopped = finish(process)
    assert stopped.code == 75, stopped
    resumed = rehearsal.resume()
    assert resumed.code == 0, resumed
    assert rehearsal.final() == undisturbed
    lines = (rehearsal.run_dir / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line)["event"] for line in lines), "and nothing else is in the journal"


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes_is_a_stop_unless_nohup_says_otherwise(
    rehearsal: Rehearsal, undisturbed: dict[str, str], nohup: bool
) -> None:
    rehearsal.around = (sys.executable, "-c", ON_A_TERMINAL, *(["nohup"] if nohup else []))
    process = rehearsal.start("--pause", "0.04", hold=("0:0:10",))
    rehearsal.wait_for("first_step")
    process.send_signal(signal.SIGUSR1)
    if not nohup:
        assert rehearsal.wait_for("stop_requested")["by"] == "SIGHUP"
    rehearsal.release(10)
    ended = finish(process)
    assert ended.code == (0 if nohup else 75), ended
    if not nohup:
        rehearsal.around = ()
        assert rehearsal.resume().code == 0
    assert rehearsal.final() == undisturbed


def test_a_full_disk_costs_lines_of_the_logs_and_no_training(
    rehearsal: Rehearsal, small_disk: Path
) -> None:
    script = rehearsal.directory / "talks.py"
    script.write_text(
        "import torch, autoglm_resume as autoglm\n"
        "session = autoglm.init()\n"
        "session.track(model=torch.nn.Linear(2, 1))\n"
        "for step in session.steps(4):\n"
        "    print('x' * 500_000)\n"
    )
    checkpoints = str(rehearsal.directory / "checkpoints")
    ended = rehearsal.run(
        script=str(script),
        nproc_per_node=1,
        run_dir=str(small_disk / "run"),
        checkpoint={"dir": checkpoints, "every": {"steps": 1}},
    )
    assert ended.code == 0, ended
    assert "step-0000000004" in {path.name.split(".")[0] for path in Path(checkpoints).iterdir()}
    log = (small_disk / "run" / "attempts" / "000" / "rank-0.log").read_bytes()
    assert b"x" * 1000 in log
