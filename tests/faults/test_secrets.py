"""What lets others in is kept where only its owner reads it, and said nowhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.job.secret import HIDDEN
from tests.faults.conftest import Finished, Rehearsal, all_dead, finish
from tests.faults.holding import __file__ as holding
from tests.patience import PATIENCE

KEYS = ("key-of-a-variable", "key-of-an-argument", "key-of-an-address", "key-of-a-login")
SCRIPT = f"""
import os, sys, torch
import autoglm_resume as autoglm
sys.path.insert(0, {str(Path(holding).parent)!r})
from holding import hold
session = autoglm.init()
session.track(model=torch.nn.Linear(2, 1))
for step in session.steps(4):
    hold(0, step)
assert sys.argv[1:] == ["--api-key=key-of-an-argument"]
raise RuntimeError(f"401: the key {{os.environ['WANDB_API_KEY']}} was refused")
"""


@pytest.fixture
def run(rehearsal: Rehearsal) -> Rehearsal:
    """A job with a secret in every place that has one; its script says one when it fails."""
    script = rehearsal.directory / "script.py"
    script.write_text(SCRIPT)
    told = str(rehearsal.directory / "told")
    rehearsal.job.update(
        script=str(script),
        nproc_per_node=1,
        checkpoint={"every": {"steps": 1}},
        restart={"max_restarts": 0},
        env={"WANDB_API_KEY": KEYS[0], "PROXY": f"http://me:{KEYS[3]}@proxy.test"},
        notify=[
            {"webhook": f"http://127.0.0.1:9/{KEYS[2]}", "on": ["failed"]},
            {"command": ["sh", "-c", f"cat >> {told}", "--", f"--token={KEYS[1]}"]},
        ],
    )
    return rehearsal


def test_nothing_that_is_shown_journaled_or_told_has_a_secret(run: Rehearsal) -> None:
    job = run.write("--api-key=key-of-an-argument")
    for form in ([], ["--json"]):
        planned = finish(run.command("run", str(job), "--dry-run", *form))
        assert planned.code == 0, planned
        assert not [key for key in KEYS if key in planned.out + planned.err]
        assert (HIDDEN if not form else json.dumps(HIDDEN)[1:-1]) in planned.out
    ended = run.run("--api-key=key-of-an-argument")
    assert ended.code == 1, ended
    assert run.events("failure")[0]["summary"]
    shown: list[Finished] = []
    for command in ("status", "explain"):
        for form in ([], ["--json"]):
            shown.append(finish(run.command(command, str(run.run_dir), *form)))
            assert shown[-1].code == 0
    text = "".join(each.out + each.err for each in shown)
    text += (run.directory / "told").read_text() + (run.run_dir / "events.jsonl").read_text()
    assert "was refused" in text
    assert not [key for key in KEYS if key in text]
    holders = [
        path
        for path in run.run_dir.rglob("*")
        if path.is_file() and any(key.encode() in path.read_bytes() for key in KEYS)
    ]
    assert {path.name for path in holders} >= {"job.json", "assignment.json"}
    printed = {"rank-0.log", "rank-0.error.json"}  # by the script itself
    assert {p.name for p in holders if p.stat().st_mode & 0o077} <= printed


def test_a_run_is_resumed_with_them_from_its_directory_alone(run: Rehearsal) -> None:
    run.start("--api-key=key-of-an-argument", hold=("0:0:2",))
    run.wait_for("committed")
    before = run.workers()
    os.kill(run.holder(), signal.SIGKILL)
    assert all_dead(before)
    done = subprocess.run(
        [sys.executable, "-m", "autoglm_resume.cli", "resume", str(run.run_dir)],
        env={"PATH": os.environ["PATH"], "REHEARSAL": str(run.directory)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done
    assert f"401: the key {KEYS[0]} was refused" in done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_may_look_at_a_run(run: Rehearsal) -> None:
    assert run.run("--api-key=key-of-an-argument").code == 1
    for place in (run.directory, *run.directory.parents):
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    code = """
import os, sys
from autoglm_resume.cli import app, target
from autoglm_resume.job import load
from autoglm_resume.observe import listing, status, telling
from autoglm_resume.supervise.core import history
os.setgroups([]); os.setuid(65534)  # which may not read where Python lies
app.main()
"""
    for command in ("status", "explain", "ckpts"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, str(run.run_dir)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
