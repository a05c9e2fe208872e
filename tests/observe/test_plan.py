from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from autoglm_resume.checkpoint.store.gate import GateCheck, Verdict
from autoglm_resume.observe import plan as view
from autoglm_resume.supervise.start import Plan

JOB = {"name": "demo", "script": "/jobs/train.py", "args": ["--lr", "1e-3"]}


def verdict(step: int, good: bool) -> Verdict:
    check = GateCheck("world size", good, "2", "2" if good else "4")
    return Verdict(f"step-{step:010d}.a0", step, "/c", good, (check,))


def plan(*verdicts: Verdict) -> Plan:
    accepted = next((v for v in verdicts if v.accepted), None)
    environment = {"RANK": "0", "MASTER_PORT": "(a free port)"}
    command = ["python", "/jobs/train.py", "--lr", "1e-3"]
    id, step = (accepted.id, accepted.step) if accepted else (None, 0)
    outlook = f"start from step {step}"
    code = 90 if verdicts and accepted is None else 0
    if code:
        outlook = "exit 90: none is acceptable"
    return Plan(JOB, command, environment, verdicts, id, step, outlook, code)


def test_the_whole_is_a_job_file() -> None:
    assert yaml.safe_load(view.as_text(plan())) == JOB


def test_a_job_that_would_turn_a_terminals_text_is_shown_escaped() -> None:
    wicked = {**JOB, "name": "evil \u202egnp.exe \x1b[2J", "args": ["naïve"]}
    text = view.as_text(replace(plan(), job=wicked, command=["\u202e\x9b", "naïve"]))
    assert yaml.safe_load(text) == wicked
    assert not {"\u202e", "\x1b", "\x9b"} & set(text)
    assert "naïve" in text


def test_command_environment_and_verdicts_are_shown() -> None:
    text = view.as_text(plan(verdict(60, False), verdict(40, True)))
    for part in (
        "python /jobs/train.py --lr 1e-3",
        "MASTER_PORT='(a free port)'",
        "step-0000000060.a0  rejected: world size: expected 2, found 4",
        "start from step 40",
    ):
        assert part in text


def test_without_checkpoints_it_would_start_from_the_beginning() -> None:
    assert "start from step 0" in view.as_text(plan())


def test_the_exit_code_is_what_starting_would_come_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert view.show(plan(verdict(40, True)), json=True) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40
    assert view.show(plan(verdict(40, False)), json=False) == 90
    assert "exit 90" in capsys.readouterr().out
    assert view.show(plan(), json=False) == 0
