"""Killed trainings are fed exactly what they would have been, whatever their loop and loader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import autoglm_resume
from tests.patience import PATIENCE

ROOT = Path(autoglm_resume.__file__).parent.parent
PAIRS = [
    # Every loop without workers or with some, and everything that workers can be.
    *(("iterator_first", feed) for feed in ("main", "workers", "at-once", "at-once-main")),
    *(("iterator_first", "spawned"), ("iterator_after_resume", "workers")),
    *(("loader_first", "persistent"), ("steps_first", "main"), ("steps_first", "persistent")),
    *(("epochs", "main"), ("epochs", "persistent"), ("session_epochs", "persistent")),
]


def fed(
    out: Path, cases: Mapping[tuple[str, str], Sequence[int]]
) -> dict[tuple[str, str], tuple[list[Any], list[Any]]]:
    """What the steps of an undisturbed training were given, and those of one that died after some
    steps, by loop and feed. One process imports torch for them all, and each life is a fork of it.
    """
    words = [":".join([*case, *map(str, deaths)]) for case, deaths in cases.items()]
    command = [sys.executable, "-m", "tests.worker.feed.feeding", str(out), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return {case: _told(out / "-".join(case)) for case in cases}


def _told(out: Path) -> tuple[list[Any], list[Any]]:
    whole, killed = ((out / name).read_text().splitlines() for name in ("undisturbed", "killed"))
    return [json.loads(line) for line in whole], [json.loads(line) for line in killed]


def deaths_of(case: tuple[str, str]) -> tuple[int, int]:
    """One in the first epoch, one past it; others for each case."""
    chosen = random.Random(" ".join(case))
    return chosen.randrange(1, 7), chosen.randrange(9, 15)


@pytest.mark.slow
def test_a_killed_training_is_fed_the_same_bit_for_bit(tmp_path: Path) -> None:
    found = fed(tmp_path, {case: deaths_of(case) for case in PAIRS})
    for case, (undisturbed, killed) in found.items():
        assert [step for step, *_ in killed] == list(range(len(undisturbed))), case
        assert killed == undisturbed, case
        noises = [str(batch) for _, batch, *_ in undisturbed]
        assert len(set(noises)) == len(noises), f"{case}: no noise comes twice"
    # What a batch draws does not depend on the number of workers.
    workers = (found["iterator_first", feed][0] for feed in ("main", "workers", "spawned"))
    main, *others = ([batch for _, batch, *_ in undisturbed] for undisturbed in workers)
    assert others == [main, main]
