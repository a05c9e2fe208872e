"""The same drills where CUDA and NCCL are real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoglm_resume.worker.base import rng
from tests.faults.conftest import Rehearsal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GLM = Path(__file__).parents[2] / "jobs" / "glm.py"


def test_a_rank_killed_on_a_gpu_comes_back_with_the_same_weights(
    rehearsal: Rehearsal, tmp_path: Path
) -> None:
    job = {"script": str(GLM), "nproc_per_node": "auto", "run_dir": str(rehearsal.run_dir)}
    calm = rehearsal.run("--steps", "40", **job)
    assert calm.code == 0, calm
    expected = rehearsal.final()
    rehearsal.run_dir.rename(tmp_path / "calm")
    disturbed = rehearsal.run("--steps", "40", drill=("kill:rank=0,step=22",), **job)
    assert disturbed.code == 0, disturbed
    assert not rehearsal.events("cold_start"), "the zygote must not have touched CUDA"
    assert len(rehearsal.events("attempt_started")) == 2
    assert rehearsal.final() == expected


def test_every_device_generator_continues_where_it_was_captured() -> None:
    torch.cuda.init()
    state = rng.capture()
    first = [torch.rand(4, device=f"cuda:{i}") for i in range(torch.cuda.device_count())]
    rng.restore(state)
    again = [torch.rand(4, device=f"cuda:{i}") for i in range(torch.cuda.device_count())]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
