from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autoglm_resume import events
from autoglm_resume.errors import NoAcceptableCheckpoint, UsageError
from autoglm_resume.events import Branched, RunCompleted, RunStarted
from autoglm_resume.job.load import load
from autoglm_resume.job.spec import dump
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.observe.live import Screen
from autoglm_resume.observe.pure.goodput import summarize
from autoglm_resume.supervise import start
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core import resumable
from tests.observe.runs import checkpoint, directory, flip, killed_once


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "train.py").touch()
    (tmp_path / "job.yaml").write_text("script: train.py\ncheckpoint: {dir: ckpt}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((), "no checkpoint of step 55; there is none at all"),
        ((10, 20), "no checkpoint of step 55; there are those of steps 10, 20"),
        (
            tuple(range(0, 200, 10)),
            "no checkpoint of step 55; the nearest are of steps "
            "10, 20, 30, 40, 50, 60, 70, 80, 90, 100",
        ),
    ],
)
def test_only_a_step_that_was_saved_can_be_gone_on_from(
    home: Path, steps: tuple[int, ...], said: str
) -> None:
    for step in steps:
        checkpoint(home / "ckpt", step, ranks=1)
    with pytest.raises(UsageError) as refused:
        start.start(load(home / "job.yaml"), Screen(), branch_from=55)
    assert refused.value.message == f"{home / 'ckpt'}: {said}"
    assert not (home / "runs/job/job.json").exists()


def test_what_a_branch_left_behind_cannot_be_gone_on_from(home: Path) -> None:
    for step, token in ((10, "a0"), (20, "a0"), (15, "a1")):
        checkpoint(home / "ckpt", step, token=token, ranks=1)
    directory(home / "runs/job", [Branched(step=10, attempt=1)])
    with pytest.raises(
        UsageError, match="no checkpoint of step 20; there are those of steps 10, 15"
    ):
        start.start(load(home / "job.yaml"), Screen(), branch_from=20)


def test_a_copied_project_does_not_go_on_in_the_replicas_of_the_first(home: Path) -> None:
    (home / "copies").mkdir()
    (home / "job.yaml").write_text("script: train.py\ncheckpoint: {replicas: [copies]}\n")
    run = directory(home / "runs/job", killed_once().events[:1], run_dir=str(home / "runs/job"))
    copy = home / "copy"
    shutil.copytree(home / "runs", copy / "runs")
    (copy / "train.py").touch()
    (copy / "job.yaml").write_text((home / "job.yaml").read_text().replace("copies", "../copies"))
    with pytest.raises(UsageError, match=f"a copy of the run in {run}, which is still there"):
        start.start(load(copy / "job.yaml"), Screen())


def test_a_run_that_was_moved_away_from_its_code_says_how_to_start_it(home: Path) -> None:
    job = dump(load(home / "job.yaml"))
    moved = directory(home / "moved", killed_once().events[:1], **job)
    (home / "train.py").unlink()
    with pytest.raises(UsageError, match=r"train\.py: not there") as refused:
        start.resume(moved, Screen())
    assert f"--set run_dir={moved}" in refused.value.hint


@pytest.mark.parametrize("where", ["ckpt", "runs/job/checkpoints"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_new_job_does_not_go_on_from_what_another_has_made(
    home: Path, where: str, fresh: bool
) -> None:
    (home / "job.yaml").write_text(f"script: train.py\ncheckpoint: {{dir: {where}}}\n")
    first = load(home / "job.yaml")
    directory(home / "runs/job", [RunStarted(run_id="abc")])
    RunDirectory(home / "runs/job").save_job(dump(first))
    with locked_checkpoints(home / where, home / "runs/job"):
        kept = checkpoint(home / where, 10, ranks=1)
    (home / "other.yaml").write_text(f"script: train.py\ncheckpoint: {{dir: {where}}}\n")
    with pytest.raises(
        UsageError, match=f"{where}: expected checkpoints of .*runs/other"
    ) as caught:
        start.start(load(home / "other.yaml"), Screen(), fresh=fresh)
    assert f"autoglm resume {home}/runs/job" in caught.value.hint
    assert (home / where / kept).is_dir()
    assert not (home / "runs/other").exists()


@pytest.mark.usefixtures("own_signals")
def test_a_start_that_is_refused_for_its_job_leaves_the_run_as_it_was(home: Path) -> None:
    where = home / "runs/job/checkpoints"
    text = "script: train.py\nguards: {free_disk: 0}\n"
    (home / "job.yaml").write_text(text)
    job = load(home / "job.yaml")
    told = [events.RunStarted(run_id="abc"), events.SupervisorStarted()]
    for step in (10, 20):
        checkpoint(where, step, ranks=1)
        told.append(events.Committed(id=f"step-{step:010d}.a0", step=step))
    shutil.rmtree(where / "step-0000000010.a0")
    told.append(events.RunInterrupted(code=75, reason="stopped", step=20))
    run = RunDirectory(directory(home / "runs/job", told, **dump(job)))
    before = resumable.of(run.events())
    (home / "other.yaml").write_text(f"{text}name: job\nnproc_per_node: 2\n")
    with pytest.raises(NoAcceptableCheckpoint, match="world size: expected 2, found 1"):
        start.start(load(home / "other.yaml"), Screen())
    assert run.job() == dump(job)
    assert resumable.of(run.events()) == before
    summary = summarize(run.events())
    assert (summary.state, summary.checkpoint_step) == ("interrupted", 20)
    flip(where / "step-0000000020.a0/rank-00000.pack")
    with pytest.raises(NoAcceptableCheckpoint, match="integrity"):
        start.start(load(home / "job.yaml"), Screen())
    assert not resumable.of(run.events()).goes_on, "its own job: that is for a person"
    with pytest.raises(NoAcceptableCheckpoint):
        start.start(load(home / "other.yaml"), Screen())
    assert not resumable.of(run.events()).goes_on, "another job does not make it better"


def test_a_finished_run_without_a_checkpoint_is_not_taken_for_one_of_another_command(
    home: Path,
) -> None:
    (home / "job.yaml").write_text("script: train.py\nargs: [--seed, 0]\n")
    job = load(home / "job.yaml")
    over = [RunStarted(run_id="abc"), RunCompleted(step=9)]
    directory(home / "runs/job", over, **dump(job))
    assert start.start(job, Screen()) == 0
    (home / "job.yaml").write_text("script: train.py\nargs: [--seed, 1]\n")
    other = load(home / "job.yaml")
    with pytest.raises(UsageError, match="--seed: 0 then, 1 now") as refused:
        start.start(other, Screen())
    assert "--set name=job-2" in refused.value.hint
    assert start.plan(other).code == refused.value.exit_code
    assert start.resume(home / "runs/job", Screen()) == 0, "that of the run itself"
