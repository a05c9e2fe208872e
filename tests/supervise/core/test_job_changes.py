from __future__ import annotations

from typing import Any

import pytest

from autoglm_resume.job.spec import Job, dump
from autoglm_resume.supervise.core.job_changes import JobChanges, job_changes

NOW = {
    **{"script": "/project/train.py", "name": "job", "workdir": "/project"},
    **{"run_dir": "/runs/job", "checkpoint": {"dir": "/runs/job/checkpoints"}},
}


def job(*args: str, **members: Any) -> dict[str, Any]:
    return dump(Job.model_validate({**NOW, "args": list(args), **members}))


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (("--lr", "0.1"), ("--lr", "0.1"), ()),
        (("--lr", "0.1"), ("--lr=.1",), ()),
        (("--lr", "0.1"), ("--lr", "0.2"), ("--lr: 0.1 then, 0.2 now",)),
        (("1e-3",), ("1e-1",), ("argument 1: 1e-3 then, 1e-1 now",)),
        ((), ("--epochs", "5"), ("--epochs: not given then, 5 now",)),
        (("--api-key=one",), ("--api-key=two",), ()),
        ((), ("--resume", "auto"), ()),
    ],
)
def test_arguments_are_compared_by_what_they_mean(
    before: tuple[str, ...], now: tuple[str, ...], found: tuple[str, ...]
) -> None:
    assert job_changes(job(*before), job(*now)) == JobChanges(command=found)


@pytest.mark.parametrize(
    ("before", "now", "may"),
    [
        (("--steps", "10"), ("--steps", "20"), False),
        (("--max-epochs=1", "--num_train_epochs", "2"), ("--max-epochs=3",), False),
        (("trainer.max_steps=1",), ("trainer.max_steps=2",), True),
        (("10",), ("20",), False),
        (("0.1",), ("0.2",), True),
        (("--lr", "1"), ("--lr", "2"), True),
        (("--steps", "1", "--lr", "1"), ("--steps", "2", "--lr", "2"), True),
        (("--steps-warmup", "1"), ("--steps-warmup", "2"), True),
        ((), (), False),
    ],
)
def test_what_a_checkpoint_may_know_better_is_all_but_how_long_to_train(
    before: tuple[str, ...], now: tuple[str, ...], may: bool
) -> None:
    assert job_changes(job(*before), job(*now)).may_be_restored is may


def test_another_script_is_told_and_a_moved_one_is_the_same() -> None:
    elsewhere = job(script="/elsewhere/train.py")
    assert job_changes(elsewhere, job()) == JobChanges()
    remains = job_changes(elsewhere, job(), remains=True)
    assert remains.command == ("script: /elsewhere/train.py then, /project/train.py now",)
    assert job_changes(job(), job(), remains=True) == JobChanges()
    found = job_changes(job(script="/project/other.py"), job())
    assert found.command == ("script: /project/other.py then, /project/train.py now",)


def test_everything_is_told_with_both_values() -> None:
    before = job(env={"DATA": "/old", "GONE": "1"}, nproc_per_node=1, preload=["json"])
    now = job(
        env={"DATA": "/new"},
        nproc_per_node="auto",
        guards={"model": "off"},
        notify=[{"command": ["say", "it"]}],
        checkpoint={**NOW["checkpoint"], "strict": False},
    )
    found = job_changes(before, now)
    assert found.variables == ("env.DATA: /old then, /new now", "env.GONE: 1 then, not given now")
    assert found.settings[:-1] == (
        "nproc_per_node: 1 then, auto now",
        "preload: [json] then, not given now",
        "checkpoint.strict: true then, false now",
        "guards.model: strict then, off now",
    )
    assert found.settings[-1].startswith("notify: not given then, [{")
    assert found.told == found.variables
    assert found.all == (*found.variables, *found.settings)


def test_what_is_new_in_skip_is_told_by_itself() -> None:
    before, now = (
        job(checkpoint={**NOW["checkpoint"], "skip": skip}) for skip in (["a"], ["a", "b"])
    )
    assert job_changes(before, now).skip == ("b",)
    assert job_changes(now, before).skip == ()


def test_what_is_secret_is_told_without_its_values() -> None:
    before, now = (
        job(
            env={"WANDB_API_KEY": f"{which}-key", "STORE": f"s3://{which}:pw@host/a"},
            notify=[{"webhook": f"https://hooks.example.org/{which}"}],
        )
        for which in ("one", "two")
    )
    assert job_changes(before, now).all == (
        "env.WANDB_API_KEY: another one now (hidden)",
        "env.STORE: another one now (hidden)",
        "notify: another one now (hidden)",
    )


def test_a_project_that_was_moved_with_its_run_is_the_same() -> None:
    there = job(env={"DATA": "/project/data"}, run_dir="/project/runs/job")
    here = job(
        script="/new/train.py",
        workdir="/new",
        run_dir="/new/runs/job",
        env={"DATA": "/new/data"},
    )
    assert job_changes(there, here) == JobChanges()
    moved_alone = job(run_dir="/elsewhere/job", env={"DATA": "/project/data"})
    assert job_changes(there, moved_alone) == JobChanges()
