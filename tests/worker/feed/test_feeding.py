"""Killed trainings are fed exactly what they would have been, whatever their loop and loader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autoglm_resume
from tests.patience import PATIENCE

ROOT = Path(autoglm_resume.__file__).parent.parent


def fed(out: Path, loop: str, feed: str, *deaths: int) -> tuple[list[Any], list[Any]]:
    """What the steps of an undisturbed training were given, and those of one that died."""
    command = [
        sys.executable,
        "-m",
        "tests.worker.feed.feeding",
        loop,
        feed,
        str(out),
        *map(str, deaths),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    whole, killed = ((out / name).read_text().splitlines() for name in ("undisturbed", "killed"))
    return [json.loads(line) for line in whole], [json.loads(line) for line in killed]


def deaths_of(name: str) -> tuple[int, int]:
    """One in the first epoch, one past it; others for each name."""
    chosen = random.Random(name)
    return chosen.randrange(1, 7), chosen.randrange(9, 15)


@pytest.mark.parametrize(
    ("loop", "feed"),
    [
        # Every loop without workers or with some, and everything that workers can be.
        *(("iterator_first", feed) for feed in ("main", "workers", "at-once", "at-once-main")),
        *(("iterator_first", "spawned"), ("iterator_after_resume", "workers")),
        *(("loader_first", "persistent"), ("steps_first", "main"), ("steps_first", "persistent")),
        *(("epochs", "main"), ("epochs", "persistent")),
    ],
)
def test_a_killed_training_is_fed_the_same_bit_for_bit(
    tmp_path: Path, loop: str, feed: str
) -> None:
    undisturbed, killed = fed(tmp_path, loop, feed, *deaths_of(f"{loop} {feed}"))
    assert [step for step, *_ in killed] == list(range(len(undisturbed)))
    assert killed == undisturbed
    noises = [str(batch) for _, batch, *_ in undisturbed]
    assert len(set(noises)) == len(noises), "no noise comes twice"


def test_what_a_batch_draws_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    batches = []
    for feed in ("main", "workers", "spawned"):
        (out := tmp_path / feed).mkdir()
        undisturbed, _ = fed(out, "iterator_first", feed)
        batches.append([batch for _, batch, *_ in undisturbed])
    assert batches[0] == batches[1] == batches[2]
