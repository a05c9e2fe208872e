"""Slurm's side in texts; with a real Slurm: tests/faults/test_slurm.py."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

from autoglm_resume.cluster import slurm
from autoglm_resume.errors import UsageError
from autoglm_resume.job.load import load
from autoglm_resume.job.spec import Job
from tests.patience import PATIENCE

TEMPLATE = Path(__file__).parents[2] / "scripts" / "slurm" / "job.sbatch"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return made(tmp_path)


def made(tmp_path: Path, *overrides: str) -> Job:
    (tmp_path / "train.py").touch()
    (tmp_path / "my job.yaml").write_text("script: train.py\nname: demo\n")
    return load(tmp_path / "my job.yaml", overrides)


def test_outside_slurm_there_is_no_allocation() -> None:
    assert slurm.allocation({"PATH": "/bin"}) is None


def test_an_allocation_is_named_as_slurms_commands_name_it() -> None:
    plain = {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "n1"}
    assert slurm.allocation(plain) == slurm.Allocation("17", 0, "n1", None)
    task = {
        **plain,
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_END_TIME": "1700000000",
    }
    assert slurm.allocation(task) == slurm.Allocation("12_3", 2, "n1", 1.7e9)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("0", None),
        ("0-00:00", None),
        ("soon", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: float | None) -> None:
    assert slurm.time_limit(text) == seconds


def test_options_are_there_for_sbatch_to_read(job: Job) -> None:
    lines = slurm.script(
        job, ["autoglm"], time="2:00:00", partition="gpu", gpus="4", more=["--comment", "a b"]
    ).splitlines()
    head = lines[1 : lines.index("")]
    assert head == [
        "#SBATCH --job-name=demo",
        "#SBATCH --signal=B:USR2@80",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --time=2:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus=4",
        "#SBATCH --comment 'a b'",
    ]


def test_the_signal_comes_as_early_as_the_job_wants_to_be_told(tmp_path: Path) -> None:
    asked = slurm.script(made(tmp_path, "preemption.grace=300s"), ["autoglm"])
    assert "--signal=B:USR2@320" in asked


def test_a_time_limit_without_time_to_train_is_refused(job: Job) -> None:
    with pytest.raises(UsageError, match="stop 80 s before the end"):
        slurm.script(job, ["autoglm"], time="1")


def run(
    script: str, tmp_path: Path, commands: bool = True, **environment: str
) -> subprocess.Popen[str]:
    """The script as Slurm's batch shell; a `scontrol` stands in that notes what it is told."""
    place = tmp_path / "commands"
    place.mkdir(exist_ok=True)
    if commands:
        control = place / "scontrol"
        control.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
        control.chmod(0o755)
    return subprocess.Popen(
        ["/bin/bash", "-c", script],
        env={"PATH": str(place), "SLURM_JOB_ID": "17", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(tmp_path: Path) -> str:
    path = tmp_path / "told"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("code", "again"),
    [(75, True), (140, True), *((n, False) for n in (0, 1, 2, 76, 90, 93, 137, 143))],
)
def test_only_what_was_interrupted_is_requeued(
    job: Job, tmp_path: Path, code: int, again: bool
) -> None:
    script = slurm.script(job, ["/bin/sh", "-c", f"exit {code}"])
    assert run(script, tmp_path).wait(PATIENCE) == code
    assert told(tmp_path) == ("requeue 17\n" if again else "")


def test_a_job_whose_earlier_life_has_not_ended_comes_back(job: Job, tmp_path: Path) -> None:
    script = slurm.script(job, ["/bin/sh", "-c", "exit 76"])
    assert run(script, tmp_path, SLURM_RESTART_COUNT="1").wait(PATIENCE) == 76
    assert told(tmp_path) == "requeue 17\n"


def test_without_scontrol_it_says_what_a_person_can_do(job: Job, tmp_path: Path) -> None:
    script = slurm.script(job, ["/bin/sh", "-c", "exit 75"])
    done = run(script, tmp_path, commands=False)
    _, said = done.communicate(timeout=PATIENCE)
    assert done.returncode == 75
    assert said == "autoglm: scontrol is not here; continue with: scontrol requeue 17\n"


WAITS = """
import os, signal
asked = {signal.SIGUSR2, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, asked)  # pause() would miss one that comes just before it
os.write(1, b"waiting\\n")
os.write(1, f"{signal.Signals(signal.sigwait(asked)).name}\\n".encode())
os._exit(75)
"""


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR2, "requeue 17\n"), (signal.SIGTERM, "")]
)
def test_signals_reach_the_run_and_its_exit_code_counts(
    job: Job, tmp_path: Path, number: signal.Signals, requeued: str
) -> None:
    process = run(slurm.script(job, [sys.executable, "-c", WAITS]), tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, number)
    assert process.stdout.readline() == f"{number.name}\n"
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert told(tmp_path) == requeued


def test_each_task_of_an_array_has_a_run_and_replicas_of_its_own(tmp_path: Path) -> None:
    job = made(tmp_path, "checkpoint.dir=elsewhere/ck", f"checkpoint.replicas=[{tmp_path}/rep/]")
    script = slurm.script(job, SHOWS)
    alone, _ = run(script, tmp_path).communicate(timeout=PATIENCE)
    assert alone == "\n"
    of_task = made(tmp_path, *overrides_of(script, tmp_path))
    assert of_task.name == "demo-3"
    assert str(of_task.run_dir) == f"{job.run_dir}-3"
    assert of_task.checkpoint.dir == tmp_path / "elsewhere" / "ck-3"
    assert of_task.checkpoint.replicas == (f"{tmp_path}/rep/3",)


ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
SHOWS = [sys.executable, "-c", "import sys; print(*sys.argv[1:], sep='\\n')"]


def overrides_of(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """What a task is given after --set."""
    said, _ = run(script, tmp_path, **ARRAY, **environment).communicate(timeout=PATIENCE)
    lines = said.splitlines()
    return [value for flag, value in itertools.pairwise(lines) if flag == "--set"]


def test_checkpoints_inside_the_run_stay_inside(job: Job, tmp_path: Path) -> None:
    of_task = made(tmp_path, *overrides_of(slurm.script(job, SHOWS), tmp_path))
    assert str(of_task.checkpoint.dir) == f"{job.run_dir}-3/checkpoints"


def test_what_directories_are_called_means_nothing_to_the_shell_or_to_yaml(tmp_path: Path) -> None:
    strange = tmp_path / """it's #1: $HOME ${x} "dir" $$ é\\"""
    strange.mkdir()
    ck, rep = (json.dumps(f"{strange}/{name}").replace("$", "$$") for name in ("ck", "rep"))
    job = made(strange, f"checkpoint.dir={ck}", f"checkpoint.replicas=[{rep}]")
    assert job.checkpoint.dir == strange / "ck"
    of_task = made(strange, *overrides_of(slurm.script(job, SHOWS), tmp_path))
    assert of_task.run_dir == strange / "runs" / "demo-3"
    assert of_task.checkpoint.dir == strange / "ck-3"
    assert of_task.checkpoint.replicas == (f"{strange}/rep/3",)


def test_a_task_makes_its_own_replicas_but_no_mount_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rep").mkdir()
    places = [tmp_path / "rep", tmp_path / "missing"]
    job = made(tmp_path, f"checkpoint.replicas=[{places[0]},{places[1]},s3://bucket/a]")
    for _ in range(2):
        overrides = overrides_of(slurm.script(job, SHOWS), tmp_path, PATH=os.defpath)
        assert made(tmp_path, *overrides).checkpoint.replicas[2] == "s3://bucket/a/3"
        assert (tmp_path / "rep" / "3").is_dir()
        assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("options", "array"),
    [
        (["--array=0-7"], True),
        (["--array", "0-7"], True),
        (["--mem=4G", "-a0-7"], True),
        (["--account=a", "-A", "b"], False),
        ([], False),
    ],
)
def test_an_array_is_told_from_a_single_job(options: list[str], array: bool) -> None:
    assert slurm.is_array(options) is array
    assert slurm.of_task(PurePath("/runs/demo"), "TASK") == PurePath("/runs/demo-TASK")


def test_tasks_of_two_job_files_are_different_runs_by_the_template(tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    command = tmp_path / "commands" / "autoglm"
    command.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    command.chmod(0o755)
    names = []
    for file in ("my job.yaml", "other.yml"):
        script = f"set -- 'dir/{file}' --fresh\n{TEMPLATE.read_text()}"
        names += [made(tmp_path, *overrides_of(script, tmp_path)).name]
    assert names == ["my job-3", "other-3"]


def test_the_template_does_what_a_submitted_script_does(job: Job) -> None:
    begins = "# Slurm signals this shell alone."
    _, _, template = TEMPLATE.read_text().partition(begins)
    _, _, submitted = slurm.script(job, ["autoglm"]).partition(begins)
    assert template == submitted


def test_what_the_job_asks_for_is_asked_of_slurm_unless_something_else_is(tmp_path: Path) -> None:
    job = made(
        tmp_path,
        "slurm={gpus: a100:4, cpus: 8, time: 4:00:00, partition: gpu, output: logs/%j.out}",
        "slurm.options=[--mem=64G]",
    )
    lines = slurm.script(job, ["autoglm"]).splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert asked[-6:] == [
        *("--time=4:00:00", "--partition=gpu", "--gpus=a100:4", "--cpus-per-task=8"),
        *(f"--output={tmp_path}/logs/%j.out", "--mem=64G"),
    ]
    script = slurm.script(job, [], time="1:00:00", partition="low", gpus="1", more=["--mem=8G"])
    for option in ("--time=1:00:00", "--partition=low", "--gpus=1", "--mem=64G --mem=8G"):
        assert f"#SBATCH {option}\n" in script
    assert "4:00:00" not in script


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("slurm.nodes=2", "expected 1, found 2: this version runs on one machine"),
        ("slurm.options=[64G]", "expected an option of sbatch, such as --mem=64G, found '64G'"),
        ("slurm.gpu=1", "unknown key, did you mean 'gpus'?"),
        ("slurm.time=''", "expected a name, found ''"),
    ],
)
def test_what_slurm_cannot_be_asked_for_is_refused(
    tmp_path: Path, override: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        made(tmp_path, override)


def test_a_limit_of_the_job_file_that_leaves_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves no time to train"):
        slurm.script(made(tmp_path, "slurm.time=1"), [])
