"""FSDP2 models: every rank saves its own shards; the same ranks, or others, get them back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Rehearsal, finish

SHARDED = str(Path(__file__).with_name("train_sharded.py"))


def whole_epochs(lines: list[dict[str, Any]], size: int) -> int:
    """How many epochs of `size` samples were dealt; each must have every sample once."""
    dealt = [
        sample for line in sorted(lines, key=lambda e: e["step"]) for sample in line["samples"]
    ]
    epochs = len(dealt) // size
    for epoch in range(epochs):
        assert sorted(dealt[epoch * size : (epoch + 1) * size]) == list(range(size))
    return epochs


def test_a_killed_fsdp_run_ends_exactly_like_an_undisturbed_one(rehearsal: Rehearsal) -> None:
    calm = Rehearsal(rehearsal.directory / "calm")
    calm.directory.mkdir()
    assert calm.run(script=SHARDED).code == 0
    kills = ("kill:rank=1,step=8", "kill:rank=0,step=15")
    finished = rehearsal.run(script=SHARDED, drill=kills)
    assert finished.code == 0, finished
    assert len(rehearsal.events("restored")) == 4, finished
    assert rehearsal.final() == calm.final()


@pytest.mark.slow
@pytest.mark.thorough
def test_an_fsdp_run_goes_on_with_another_number_of_ranks(rehearsal: Rehearsal) -> None:
    samples = rehearsal.directory / "samples.jsonl"
    job = {"script": SHARDED, "guards": {"free_disk": 0, "world_size": "elastic"}}
    words = ("--steps", "50", "--pause", "0.02", "--epochs", str(samples))
    process = rehearsal.start(*words, **job, nproc_per_node=3, hold=("0:0:20",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 5)
    rehearsal.stop(20, process)
    assert finish(process).code == 75
    finished = rehearsal.run(*words, **job, nproc_per_node=2)
    assert finished.code == 0, finished
    check = rehearsal.events("gate")[-1]["verdicts"][0]["checks"][1]
    assert check["found"] == "3 ranks in the checkpoint, 2 now: resharded"
    event = rehearsal.events("resharded")[0]
    assert (event["from"], event["to"], event["global_batch"]) == (3, 2, 8)
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert whole_epochs(lines, 200) >= 2
    assert all(math.isfinite(line["loss"]) for line in lines)
