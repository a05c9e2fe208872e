"""What `goodput` decides without a run: its schedule, and what a run that was ended is worth."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def goodput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    loader = importlib.machinery.SourceFileLoader("goodput", str(BENCH / "goodput"))
    spec = importlib.util.spec_from_loader("goodput", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "goodput", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(5))
def test_each_sort_is_among_the_first_three_failures(goodput: ModuleType, seed: int) -> None:
    schedule = goodput.plan(30.0, 200.0, random.Random(seed))
    assert {failure.sort for failure in schedule[:3]} == set(goodput.SORTS)
    assert [failure.at for failure in schedule] == [15.0 + 30.0 * n for n in range(7)]
    assert schedule == goodput.plan(30.0, 200.0, random.Random(seed))


def run_with(goodput: ModuleType, directory: Path, lines: list[dict[str, Any]]) -> Any:
    place = goodput.peers.Place(directory, sys.executable, 100, 10)
    place.marks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = goodput.Run("one", goodput.SYSTEMS["torchrun"], place, goodput.Deadline())
    run._lines.new()
    run.began, run.took = 0.0, 50.0
    return run


def test_a_run_that_was_ended_is_worth_the_steps_it_came_to(
    goodput: ModuleType, tmp_path: Path
) -> None:
    steps = [{"what": "step", "rank": 0, "step": n, "mono": 1.0 * n} for n in (1, 2, 40)]
    run = run_with(goodput, tmp_path, steps)
    run.ended = "given up after 50 s"
    assert run.elapsed is None
    assert run.goodput(0.5) == pytest.approx(40 * 0.5 / 50.0)


def test_a_finished_run_is_measured_to_its_last_rank(goodput: ModuleType, tmp_path: Path) -> None:
    ends = [{"what": "done", "rank": n, "mono": 20.0 + n, "digest": "same"} for n in (0, 1)]
    run = run_with(
        goodput, tmp_path, [{"what": "step", "rank": 0, "step": 30, "mono": 19.0}, *ends]
    )
    assert run.elapsed == 21.0
    assert run.goodput(0.35) == pytest.approx(30 * 0.35 / 21.0)
    assert run.digests == {"same"}


def test_a_run_too_short_to_measure_takes_the_figures_of_another(
    goodput: ModuleType, tmp_path: Path
) -> None:
    run = run_with(goodput, tmp_path, [{"what": "step", "rank": 0, "step": 1, "mono": 1.0}])
    assert goodput.step_and_save(run, otherwise=(0.2, 0.4)) == (0.2, 0.4)


def test_a_signal_is_a_deadline_that_has_come(goodput: ModuleType) -> None:
    deadline = goodput.Deadline()
    assert deadline.left() == math.inf
    deadline.at = time.monotonic() + 1000
    assert 0 < deadline.left() <= 1000
    deadline.now()
    assert deadline.left() == 0
