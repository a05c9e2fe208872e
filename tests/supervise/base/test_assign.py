"""What the processes of a job are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.base.assign import environment


@pytest.mark.parametrize(
    ("said", "of_the_job", "expected"),
    [
        ("src", None, ["HERE/src"]),
        ("src:/lib::../up", None, ["HERE/src", "/lib", "HERE", "HERE/../up"]),
        (None, "src", ["WORK/src"]),
        ("other", "src:/lib", ["WORK/src", "/lib"]),
    ],
)
def test_a_relative_path_for_modules_is_seen_from_where_it_was_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str | None,
    of_the_job: str | None,
    expected: list[str],
) -> None:
    here, work = tmp_path / "here", tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if said is not None:
        monkeypatch.setenv("PYTHONPATH", said)
    env = {} if of_the_job is None else {"PYTHONPATH": of_the_job}
    fields: dict[str, Any] = {"name": "job", "script": str(work / "train.py"), "workdir": str(work)}
    fields["checkpoint"] = {"dir": str(tmp_path / "checkpoints")}
    job = Job.model_validate({**fields, "run_dir": str(tmp_path / "run"), "env": env})
    places = environment(job)["PYTHONPATH"].split(os.pathsep)
    put = [str(Path(e.replace("HERE", str(here)).replace("WORK", str(work)))) for e in expected]
    assert [str(Path(place)) for place in places] == put
