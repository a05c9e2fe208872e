from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.journal import encode
from autoglm_resume.locks import locked_checkpoints
from autoglm_resume.supervise.core import history
from autoglm_resume.worker import run_beside
from autoglm_resume.worker.run_beside import RunBeside

STORY: list[dict[str, Any]] = [
    {"event": "run_started", "run_id": "abc", "name": "run"},
    {"event": "attempt_started", "attempt": 0, "step": 0, "time": 1.0},
    {"event": "committed", "id": "step-0000000010.a0", "step": 10, "objects": {}},
    {"event": "committed", "id": "step-0000000020.a0", "step": 20, "objects": {}},
    {"event": "attempt_started", "attempt": 1, "step": 20, "time": 2.0},
    {"event": "branched", "attempt": 2, "step": 10},
    {"event": "from tomorrow"},
    {"event": "attempt_started", "attempt": 2, "step": 10, "time": 3.0},
    {"event": "committed", "id": "step-0000000015.a2", "step": 15, "objects": {}},
    {"event": "branched", "attempt": 3, "step": 15, "reason": "what was saved since may be bad"},
]


def write_run(directory: Path, root: Path, story: list[dict[str, Any]], **how: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    job = {"name": "run", "checkpoint": {"dir": str(root), **how}}
    (directory / "job.json").write_text(json.dumps(job))
    (directory / "events.jsonl").write_bytes(b"".join(encode(events.read(line)) for line in story))


@pytest.mark.parametrize("length", range(len(STORY) + 1))
def test_it_knows_of_a_run_what_its_supervisor_knows(length: int) -> None:
    story = list(map(events.read, STORY[:length]))
    found = run_beside.recall(story)
    past = history.recall(story)
    assert found.branches == past.branches
    assert (found.attempts, found.checkpointed) == (past.attempts, past.checkpointed)
    assert found.id == (past.run_id or "")


@pytest.mark.parametrize("below", ["checkpoints", "some/where"])
def test_a_run_is_found_above_its_checkpoints(tmp_path: Path, below: str) -> None:
    root = tmp_path / "runs" / "one" / below
    write_run(tmp_path / "runs" / "one", root, STORY, replicas=["/replica"])
    expected = RunBeside("abc", ("/replica",), 3, 15, ((10, 2), (15, 3)))
    assert run_beside.find(root) == expected


def test_a_run_elsewhere_is_found_by_what_its_supervisor_left_behind(tmp_path: Path) -> None:
    root, run = tmp_path / "disk", tmp_path / "runs" / "one"
    write_run(run, root, STORY)
    assert run_beside.find(root) == RunBeside()
    with locked_checkpoints(root, run):
        pass
    with locked_checkpoints(root):  # as `autoglm prune` does, which may not know the run
        pass
    assert run_beside.find(root).id == "abc"


def test_a_run_above_that_has_its_checkpoints_elsewhere_is_none_of_them(tmp_path: Path) -> None:
    write_run(tmp_path, tmp_path / "other", STORY)
    assert run_beside.find(tmp_path / "checkpoints") == RunBeside()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"checkpoint": null}'])
def test_what_cannot_be_read_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".lock").write_text(text)
    assert run_beside.find(tmp_path / "checkpoints") == RunBeside()


@pytest.mark.parametrize(
    "somebodys",
    [
        *("null", "[]", "3", "{", '{"checkpoint": "last.pt"}', '{"checkpoint": ["last.pt"]}'),
        *('{"checkpoint": {"dir": 5}}', '{"checkpoint": {}}'),
    ],
)
def test_a_job_file_of_somebody_elses_is_no_run(tmp_path: Path, somebodys: str) -> None:
    (tmp_path / "job.json").write_text(somebodys)
    assert run_beside.find(tmp_path / "checkpoints" / "train") == RunBeside()


@pytest.mark.parametrize("replicas", [3, "s3://bucket", [3, "/replica"], {"a": 1}])
def test_replicas_that_are_none_are_passed_over(tmp_path: Path, replicas: object) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, run / "checkpoints", STORY[:1], replicas=replicas)
    expected = ("/replica",) if isinstance(replicas, list) else ()
    assert run_beside.find(run / "checkpoints").replicas == expected


def test_a_run_whose_journal_cannot_be_read_is_none(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, run / "checkpoints", [])
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    assert run_beside.find(run / "checkpoints") == RunBeside()
