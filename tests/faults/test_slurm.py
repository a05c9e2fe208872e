"""Runs under a real Slurm of two nodes: what it takes away comes back, with the same result."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Event, Finished, Rehearsal, finish
from tests.patience import PATIENCE, soon

CLUSTER = Path(__file__).parents[2] / "scripts" / "slurm" / "cluster"
SBIN = "/usr/sbin:/sbin"

SLOWLY = ("--pause", "0.04")
HELD = ("0:0:30",)
"""The first attempt waits for what Slurm does to it."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    missing = [p for p in programs if not (shutil.which(p) or shutil.which(p, path=SBIN))]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed")
    directory = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([CLUSTER, "up", directory], check=True, timeout=PATIENCE)
        yield directory / "slurm.conf"
    finally:
        subprocess.run([CLUSTER, "down", directory], check=True, timeout=PATIENCE)


class Scheduled:
    """A job that Slurm runs."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        self.id = ""
        self._down = ""

    def command(self, *words: str) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(
            words, cwd=self.rehearsal.directory, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *options: str) -> Finished:
        """By `autoglm slurm submit`, of the job file that is there."""
        submitted = finish(
            self.rehearsal.command("slurm", "submit", "job.yaml", *options, hold=HELD)
        )
        self.rehearsal.processes.clear()
        if not submitted.code and "--dry-run" not in options:
            self.id = submitted.out.strip()
        return submitted

    def start(self, *args: str) -> None:
        """Submit the training with these arguments, and wait until it trains."""
        self.rehearsal.write(*args)
        submitted = self.submit("--time", "10", "--", "--cpus-per-task=2")
        assert submitted.code == 0, submitted
        self.rehearsal.wait_for("first_step")

    def preempt(self) -> None:
        """Want both nodes, for a moment."""
        self.command("sbatch", "-p", "high", "-N2", "-c2", "-o", "high.txt", "--wrap", "true")

    def go_on(self) -> None:
        """Let the first attempt end, once it has been asked to stop."""
        self.rehearsal.wait_for("stop_requested")
        self.rehearsal.release(30)

    def set_down(self) -> str:
        """Set the node down that it runs on; returns which."""
        self._down = self.command("squeue", "-h", "-j", self.id, "-o", "%N")
        self.command("scontrol", "update", f"node={self._down}", "state=down", "reason=drill")
        return self._down

    def fact(self, name: str) -> str:
        """Of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", self.id).split()
        return next(word for word in words if word.startswith(f"{name}=")).partition("=")[2]

    def state(self, *wanted: str) -> str:
        """Its state, once it is one of `wanted`; Slurm has nothing that one could wait on."""
        deadline = soon()
        while (state := self.fact("JobState")) not in wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return state

    def end(self) -> None:
        """Leave the cluster as it was."""
        subprocess.run(["scancel", "--me"], check=False, capture_output=True)
        self.rehearsal.kill_workers()
        if self._down:
            self.command("scontrol", "update", f"node={self._down}", "state=resume")
        deadline = soon()
        while self.command("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)


@pytest.fixture
def job(
    slurm_conf: Path, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scheduled]:
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    rehearsal.job["preemption"] = {"grace": "5s"}
    scheduled = Scheduled(rehearsal)
    yield scheduled
    scheduled.end()


def lives(events: list[Event]) -> list[int]:
    """How often Slurm said it had requeued the job, at each start."""
    return [event["restarts"] for event in events if event["event"] == "slurm"]


def test_a_preempted_run_saves_requeues_itself_and_completes_exactly(
    job: Scheduled, undisturbed: dict[str, str]
) -> None:
    job.start(*SLOWLY)
    job.preempt()
    job.go_on()
    job.rehearsal.wait_for("run_completed")
    events = job.rehearsal.events()
    assert lives(events) == [0, 1]
    assert [e["by"] for e in events if e["event"] == "stop_requested"] == ["SIGUSR2"]
    assert [e["code"] for e in events if e["event"] == "run_interrupted"] == [75]
    stopped = next(e["step"] for e in events if e["event"] == "stopped")
    assert [e["step"] for e in events if e["event"] == "attempt_started"] == [0, stopped]
    assert job.rehearsal.final() == undisturbed
    assert job.state("COMPLETED") == "COMPLETED"


def test_a_run_whose_time_ends_saves_before_that_without_being_told(
    job: Scheduled, undisturbed: dict[str, str]
) -> None:
    job.rehearsal.write(*SLOWLY)
    script = job.submit("--time", "5", "--dry-run").out
    assert "--signal=B:USR2@25" in script
    # Slurm's own warning is taken out, and the end comes earlier than a limit in minutes can say.
    lines = [line for line in script.splitlines() if "--signal" not in line]
    soon = 'scontrol update job=$SLURM_JOB_ID EndTime=now+50seconds; echo "$?" >> soon.txt'
    lines.insert(lines.index(""), f"[[ ${{SLURM_RESTART_COUNT:-}} ]] || {{ {soon}; }}")
    (job.rehearsal.directory / "job.sh").write_text("\n".join(lines))
    job.id = job.command("env", f"HOLD={HELD[0]}", "sbatch", "--parsable", "job.sh")
    job.go_on()
    job.rehearsal.wait_for("run_completed")
    assert (job.rehearsal.directory / "soon.txt").read_text() == "0\n"
    events = job.rehearsal.events()
    assert lives(events) == [0, 1]
    assert events[0]["event"] == "run_started"
    asked = [e["by"] for e in events if e["event"] == "stop_requested"]
    assert asked == ["the end of the job's time"]
    assert job.rehearsal.final() == undisturbed


def test_a_run_on_a_node_set_down_goes_on_exactly_on_the_other(
    job: Scheduled, undisturbed: dict[str, str]
) -> None:
    job.start(*SLOWLY)
    down = job.set_down()
    job.go_on()
    job.rehearsal.wait_for("run_completed")
    nodes = [event["node"] for event in job.rehearsal.events("slurm")]
    assert nodes == [down, "n2" if down == "n1" else "n1"]
    assert job.rehearsal.final() == undisturbed


def test_a_requeued_run_completes_exactly(job: Scheduled, undisturbed: dict[str, str]) -> None:
    job.start(*SLOWLY)
    job.command("scontrol", "requeue", job.id)
    job.go_on()
    job.rehearsal.wait_for("run_completed")
    assert lives(job.rehearsal.events()) == [0, 1]
    assert job.rehearsal.final() == undisturbed


def test_every_task_of_an_array_is_a_run_that_requeues_itself(
    job: Scheduled, undisturbed: dict[str, str]
) -> None:
    job.rehearsal.write(*SLOWLY)
    assert job.submit("--", "--array=3,7", "--cpus-per-task=2").code == 0
    places = [Rehearsal(job.rehearsal.directory), Rehearsal(job.rehearsal.directory)]
    for place, task in zip(places, (3, 7), strict=True):
        place.run_dir = job.rehearsal.directory / "runs" / f"job-{task}"
        place.wait_for("first_step")
    job.preempt()
    for place in places:
        place.wait_for("stop_requested")
    job.rehearsal.release(30)
    for place, task in zip(places, (3, 7), strict=True):
        place.wait_for("run_completed")
        assert [e["job"] for e in place.events("slurm")] == [f"{job.id}_{task}"] * 2
        assert lives(place.events()) == [0, 1]
        assert place.events("run_started")[0]["name"] == f"job-{task}"
        assert place.final() == undisturbed


def test_a_run_that_fails_for_good_is_not_requeued(job: Scheduled) -> None:
    job.rehearsal.write("--fail", "always")
    assert job.submit().code == 0
    assert job.state("FAILED") == "FAILED"
    assert (job.fact("Restarts"), job.fact("ExitCode")) == ("0", "1:0")


def test_a_cancelled_run_saves_and_is_not_requeued(job: Scheduled) -> None:
    job.start(*SLOWLY)
    job.command("scancel", job.id)
    job.go_on()
    assert job.rehearsal.wait_for("run_interrupted")["code"] == 75
    assert job.state("CANCELLED") == "CANCELLED"
    assert job.fact("Restarts") == "0"


def test_what_sbatch_refuses_is_told_in_its_own_words(job: Scheduled) -> None:
    job.rehearsal.write()
    refused = job.submit("--partition", "nowhere")
    assert refused.code == 2
    assert "invalid partition specified: nowhere" in refused.err
