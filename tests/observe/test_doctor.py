from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from autoglm_resume.job.spec import Job
from autoglm_resume.observe import doctor
from autoglm_resume.observe.doctor import Finding
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.checks import MachineCheck
from tests.observe.runs import checkpoint, directory, killed_once


@pytest.mark.parametrize(
    ("check", "guards", "verdict"),
    [
        (MachineCheck("disk", True, "", guard="disk"), {}, "ok"),
        (MachineCheck("gpus", None, "", guard="gpus"), {"gpus": "strict"}, "unknown"),
        (MachineCheck("disk", False, "", guard="disk"), {}, "warning"),
        (MachineCheck("disk", False, "", guard="disk"), {"disk": "strict"}, "wrong"),
        (MachineCheck("disk", False, "", guard="disk", refuses=True), {"disk": "off"}, "wrong"),
        (MachineCheck("storage /a", False, "", guard="storage"), {}, "wrong"),
        (MachineCheck("replica /b", False, ""), {}, "warning"),
        (MachineCheck("collective round", False, "", guard="collective"), {}, "wrong"),
        (MachineCheck("torch", False, ""), {}, "wrong"),
    ],
)
def test_how_serious_it_is_the_job_decides(
    check: MachineCheck, guards: dict[str, str], verdict: str, tmp_path: Path
) -> None:
    finding = Finding(check, doctor.verdict(check, job(tmp_path, guards=guards).guards))
    assert finding.verdict == verdict
    assert doctor.code([finding]) == (verdict == "wrong")


def job(tmp_path: Path, **fields: object) -> Job:
    run = tmp_path / "demo"
    return Job.model_validate(
        {
            **{"name": "demo", "script": "train.py", "workdir": tmp_path, "run_dir": run},
            **{"nproc_per_node": 2, "checkpoint": {"dir": run / "checkpoints"}, **fields},
        }
    )


def test_a_run_that_has_checkpoints_is_measured_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory(tmp_path / "demo", killed_once().events)
    checkpoint(tmp_path / "demo" / "checkpoints", 10)
    before = sorted(tmp_path.rglob("*"))
    findings = doctor.examine(job(tmp_path, env={"MASTER_PORT": "29871"}))
    checks = {finding.check.name: finding.check for finding in findings}
    assert "snapshots of each of 2 ranks" in checks["host memory"].expected
    assert "the next 3 checkpoints" in checks["disk"].expected or "free_disk" in (
        checks["disk"].expected
    )
    assert (checks["port"].found, checks["leftovers"].found) == ("free", "none")
    assert checks["clock"].ok
    assert sorted(tmp_path.rglob("*")) == before
    doctor.show(findings)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["what", "found", "verdict", "what", "to", "do"]
    assert len(rows) == len(findings) == len(doctor.to_json(findings))


def test_what_a_start_would_refuse_is_wrong(tmp_path: Path) -> None:
    wanted = job(tmp_path, guards={"free_disk": "1000TiB"})
    (disk,) = (each for each in doctor.examine(wanted) if each.check.name == "disk")
    assert (disk.verdict, disk.check.refuses) == ("wrong", True)


def test_a_port_in_use_is_told_unless_the_run_itself_may_use_it(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        number = str(taken.getsockname()[1])
        wanted = job(tmp_path, env={"MASTER_PORT": number})
        (port,) = (each for each in doctor.examine(wanted) if each.check.name == "port")
        assert port.verdict == "wrong"
        assert port.check.found.startswith(f"in use by process {os.getpid()} (")
        with RunDirectory(Path(wanted.run_dir)).locked():
            names = {each.check.name for each in doctor.examine(wanted)}
    assert names.isdisjoint({"port", "leftovers"})


def test_what_is_wrong_is_shown_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([Finding(MachineCheck("x", False, "2", "3", "count again"), "wrong")])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["x", "2", "wrong", "expected:", "3;", "count", "again"]
