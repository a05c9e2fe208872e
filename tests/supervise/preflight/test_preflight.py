from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from autoglm_resume.events import Event, WarningGiven
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.supervise.base.gpu_exclusion import VISIBLE, excluding, without
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.checks import GpuFacts
from autoglm_resume.supervise.preflight import collective_round, gpu_probe, preflight
from autoglm_resume.supervise.preflight.preflight import Preflight
from tests.observe.runs import checkpoint, directory, killed_once


class Asked:
    """A run directory, and what its readiness told the journal."""

    def __init__(self, tmp_path: Path, **guards: Any) -> None:
        self.run = RunDirectory(directory(tmp_path / "demo", killed_once().events))
        self.checkpoints = self.run.path / "checkpoints"
        self.job = Job.model_validate(
            {
                **{"name": "demo", "script": "train.py", "workdir": tmp_path, "guards": guards},
                **{"run_dir": self.run.path, "checkpoint": {"dir": self.checkpoints}},
            }
        )
        self.told: list[str] = []
        self.ready = Preflight(self.run, self.job, self.tell)

    def tell(self, event: Event, /) -> None:
        assert isinstance(event, WarningGiven)
        self.told.append(event.text)

    def before(self, resume: ResumePoint | None = None) -> None:
        self.ready.before(Store(self.checkpoints), resume)


def test_a_machine_that_will_do_is_passed_in_silence(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    preflight.require_storage(asked.job)
    asked.ready.begin()
    asked.before()
    assert [text for text in asked.told if not text.startswith(("gpu", "/dev/shm"))] == []


def test_a_strict_guard_refuses_the_first_start_and_warns_of_later_ones(tmp_path: Path) -> None:
    asked = Asked(tmp_path, disk="strict", free_disk="1000TiB")
    with pytest.raises(UsageError) as refused:
        asked.before()
    assert refused.value.message.startswith("guards.disk: disk: expected at least 1024000.00 GiB")
    assert refused.value.hint.endswith("or set guards.disk: lenient")
    asked.before()
    assert asked.told[0].startswith("disk: expected at least 1024000.00 GiB")


def test_a_lenient_guard_warns_once_and_one_that_is_off_never(tmp_path: Path) -> None:
    lenient = Asked(tmp_path, free_disk="1000TiB")
    off = Asked(tmp_path, free_disk="1000TiB", disk="off")
    for _ in range(3):
        lenient.before()
        off.before()
    assert len(lenient.told) == 1
    assert off.told == []


def test_a_gpu_that_was_left_out_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, gpus="strict")
    wanted: list[str | None] = []

    def look(ours: Callable[[int], bool], listed: str | None) -> tuple[tuple[GpuFacts, ...], str]:
        wanted.append(listed)
        return tuple(
            GpuFacts(f"GPU {n}", "broken" if n == "1" else "") for n in listed.split(",")
        ), ""  # type: ignore[union-attr]

    monkeypatch.setattr(gpu_probe, "look", look)  # a broken GPU cannot be had
    monkeypatch.setenv(VISIBLE, "0,1,2")
    whole = asked.job.model_copy(update={"nproc_per_node": 3})
    smaller = without(whole, [excluding(whole, 1)])
    for job in (whole, smaller):
        ready = Preflight(asked.run, job, asked.tell)
        ready.begin()
        with contextlib.nullcontext() if job is smaller else pytest.raises(UsageError):
            ready.before(Store(asked.checkpoints), None)
    assert wanted == ["0,1,2", "0,2"]


def test_needs_are_measured_by_the_checkpoint_it_goes_on_from(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert preflight.needs(asked.job, Store(asked.checkpoints)).snapshot is None
    for step in (10, 20):
        path = checkpoint(asked.checkpoints, step)
    store = Store(asked.checkpoints)
    found = preflight.needs(asked.job, store, ResumePoint(path.name, 20, ""), written=1.0)
    manifest = store.load_manifest(path)
    assert (found.snapshot, found.stored) == (manifest.raw, manifest.stored)
    assert (found.keep, found.present, found.written) == (3, 2, manifest.created)
    assert preflight.needs(asked.job, store) == preflight.needs(asked.job, store, None)


def test_a_damaged_checkpoint_only_leaves_sizes_unknown(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    path = checkpoint(asked.checkpoints, 10)
    (path / "manifest.json").write_text("{")
    assert preflight.needs(asked.job, Store(asked.checkpoints)).stored is None
    asked.before(ResumePoint(path.name, 10, ""))


def test_the_last_event_tells_when_the_run_was_written(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    at = time.time()
    with asked.run.journal.open("a") as file:
        file.write(json.dumps({"event": "note", "time": at}) + '\n{"event": "torn", "ti')
    assert preflight.last_written(asked.run.journal) == at
    assert preflight.last_written(tmp_path / "nothing") is None


def test_a_round_among_processes_that_reach_each_other_succeeds() -> None:
    error, took = collective_round.run(2, os.environ)
    assert error == ""
    assert took > 0


def test_a_round_that_cannot_be_says_why() -> None:
    error, _ = collective_round.run(2, {**os.environ, "GLOO_SOCKET_IFNAME": "no-such-interface"})
    assert error.startswith("rank 0 ended with 1: ")
