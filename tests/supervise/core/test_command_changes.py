from __future__ import annotations

from typing import Any

import pytest

from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.core.command_changes import command_changes

NOW = {
    **{"script": "/project/train.py", "name": "job", "workdir": "/project"},
    **{"run_dir": "/runs/job", "checkpoint": {"dir": "/runs/job/checkpoints"}},
}


def job(*args: str, **members: Any) -> Job:
    return Job.model_validate({**NOW, "args": list(args), **members})


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (("--lr", "0.1"), ("--lr", "0.1"), []),
        (("--lr", "0.1"), ("--lr=.1",), []),
        (("--lr", "0.1"), ("--lr", "0.2"), ["--lr: 0.1 then, 0.2 now"]),
        (("1e-3",), ("1e-1",), ["argument 1: 1e-3 then, 1e-1 now"]),
        ((), ("--epochs", "5"), ["--epochs: not given then, 5 now"]),
        (("--api-key=one",), ("--api-key=two",), []),
        ((), ("--resume", "auto"), []),
    ],
)
def test_arguments_are_compared_by_what_they_mean(
    before: tuple[str, ...], now: tuple[str, ...], found: list[str]
) -> None:
    assert command_changes({**NOW, "args": list(before)}, job(*now)) == found


def test_another_script_is_told_and_a_moved_one_is_the_same() -> None:
    assert command_changes({**NOW, "script": "/elsewhere/train.py"}, job()) == []
    remains = command_changes({**NOW, "script": "/elsewhere/train.py"}, job(), remains=True)
    assert remains == ["script: /elsewhere/train.py then, /project/train.py now"]
    assert command_changes(NOW, job(), remains=True) == []
    found = command_changes({**NOW, "script": "/project/other.py"}, job())
    assert found == ["script: /project/other.py then, /project/train.py now"]


def test_of_a_job_that_nobody_knows_nothing_is_said() -> None:
    assert command_changes({}, job()) == []
