"""`autoglm resume --all`: a directory of runs, each in another state."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.faults.conftest import Rehearsal, finish
from tests.patience import PATIENCE

SLOWLY = ("--pause", "0.04")


def start(
    rehearsal: Rehearsal, name: str, *args: str, hold: str = ""
) -> tuple[Rehearsal, subprocess.Popen[str]]:
    """A run of its own in the same directory of runs, begun."""
    place = Rehearsal(rehearsal.directory)
    place.run_dir = rehearsal.directory / "runs" / name
    job = place.write(*args, nproc_per_node=1).rename(rehearsal.directory / f"{name}.yaml")
    process = place.command("run", str(job), hold=(hold,))
    rehearsal.processes.append(process)
    return place, process


@pytest.mark.slow
def test_all_is_idempotent_and_continues_what_goes_on_by_itself(rehearsal: Rehearsal) -> None:
    done, finished = start(rehearsal, "done", "--steps", "6")
    hopeless, gave_up = start(rehearsal, "hopeless", "--fail", "ninety-three")
    stopped, interrupted = start(rehearsal, "stopped", *SLOWLY, hold="0:0:20")
    dead, killed = start(rehearsal, "dead", *SLOWLY, hold="0:0:39")
    busy, running = start(rehearsal, "busy", "--pause", "0.1", "--steps", "10000")
    stopped.wait_for("first_step")
    stopped.stop(20, interrupted)
    dead.wait_for("committed")
    os.kill(dead.holder(), signal.SIGKILL)
    busy.wait_for("first_step")
    codes = [process.wait(PATIENCE) for process in (finished, gave_up, interrupted, killed)]
    assert codes == [0, 93, 75, -signal.SIGKILL]

    runs = str(rehearsal.directory / "runs")
    first = finish(rehearsal.command("resume", "--all", runs))
    assert first.code == 0, first
    lines = dict(line.split(": ", 1) for line in first.out.splitlines())
    assert lines.pop("hopeless").startswith("left alone, exit code 93: ")
    assert lines == {
        "done": "finished at step 6",
        "stopped": "continued, exit code 0: finished at step 40",
        "dead": "continued, exit code 0: finished at step 40",
        "busy": f"running, process {running.pid} on {os.uname().nodename}",
    }
    assert "run completed at step 40" in (dead.run_dir / "resume.log").read_text()

    attempts = [len(run.events("attempt_started")) for run in (done, hopeless, stopped, dead)]
    second = finish(rehearsal.command("resume", "--all", runs))
    assert second.code == 0
    assert "continued" not in second.out
    again = [len(run.events("attempt_started")) for run in (done, hopeless, stopped, dead)]
    assert again == attempts
    assert running.poll() is None


def test_a_stop_of_all_is_passed_on_and_waited_for(rehearsal: Rehearsal) -> None:
    place, process = start(rehearsal, "long", "--pause", "0.05", "--steps", "10000")
    place.wait_for("committed")
    process.kill()
    process.wait()
    before = len(place.events("first_step"))
    together = rehearsal.command("resume", "--all", str(rehearsal.directory / "runs"))
    place.processes.append(together)
    place.wait_for("first_step", lambda e: e["attempt"] == before)
    together.send_signal(signal.SIGTERM)
    ended = finish(together)
    assert ended.code == 75, ended
    assert ended.out.startswith("long: continued, exit code 75: interrupted: stopped; continues")
    assert place.events("run_interrupted")
    assert not rehearsal.workers()


def test_a_killed_supervisor_that_came_further_is_followed_by_another(
    rehearsal: Rehearsal,
) -> None:
    place, process = start(rehearsal, "long", *SLOWLY, hold="0:0:39")
    place.wait_for("committed")
    process.kill()
    process.wait()
    before = place.events("committed")[-1]["step"]
    runs = str(rehearsal.directory / "runs")
    together = rehearsal.command("resume", "--all", runs, hold=("1:0:39",))
    place.processes.append(together)
    place.wait_for("committed", lambda e: e["step"] > before)
    os.kill(place.holder(), signal.SIGKILL)
    ended = finish(together)
    assert ended.code == 0, ended
    assert ended.out == "long: continued, exit code 0: finished at step 40\n"
    assert len(place.events("supervisor_started")) == 3


def test_a_directory_that_is_not_there_is_refused_and_an_empty_one_is_fine(
    rehearsal: Rehearsal,
) -> None:
    (rehearsal.directory / "runs").mkdir()
    assert finish(rehearsal.command("resume", "--all")).code == 0
    assert finish(rehearsal.command("resume", "--all", "nowhere")).code == 2
