"""Damages to every file of a store that a real training made, as `scripts/bench/corruption` has
them, in fewer places."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoglm_resume.worker.base import rng

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
SAVES = 4


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        from lib import damage, damaged_store

        yield {"damage": damage, "store": damaged_store}


@pytest.fixture(scope="module")
def trial(bench: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("damaged")
    bench["store"].train(directory / "trained", SAVES)
    before = rng.capture()
    yield bench["store"].Trial(directory / "trained", directory / "trial")
    rng.restore(before)


def all_damages(bench: dict[str, ModuleType], trial: Any) -> list[Any]:
    return list(bench["damage"].damages(trial.pristine, 1, 7))


def test_an_undamaged_store_loads_as_it_was_saved(trial: Any) -> None:
    assert len(trial.ids) == SAVES
    assert len({Path(file).parent for file in trial.newest_needs()}) > 2, "it shares with others"
    trial.fresh()
    assert [trial.loads(id) for id in trial.ids] == [""] * SAVES


def test_every_damage_is_noticed_and_the_newest_whole_checkpoint_is_taken(
    bench: dict[str, ModuleType], trial: Any
) -> None:
    everything = all_damages(bench, trial)
    chosen = random.Random(7).sample(everything, 100)
    found = [(damage, trial.judge(damage)) for damage in chosen]
    changed = [(damage, outcome) for damage, outcome in found if outcome is not None]
    assert [f"{damage}: {outcome}" for damage, outcome in changed if not outcome.ok] == []
    assert len(changed) > 90
    assert {damage.kind for damage, _ in changed} == set(bench["damage"].KINDS)
    fallbacks = Counter(outcome.fallback for _, outcome in changed)
    assert all(fallbacks[id] for id in trial.ids[:2])


def test_damage_to_the_newest_one_alone_costs_no_more_than_the_newest_one(
    bench: dict[str, ModuleType], trial: Any
) -> None:
    newest, next_older = trial.ids[:2]
    for damage in all_damages(bench, trial):
        if damage.file.startswith(newest) and not damage.other:
            again = (damage.kind, Path(damage.file).name) == ("delete", "manifest.json")
            outcome = trial.judge(damage)
            if damage.kind == "flip" and outcome.kind == bench["store"].IDENTICAL:
                continue  # one of the few bits that zstd leaves unused
            # Parts without a manifest are what a crash leaves before the commit, which is made up.
            assert outcome.fallback == (newest if again else next_older), damage
            assert outcome.problem


def test_a_disk_that_rots_after_the_gate_has_looked_changes_no_tensor(
    bench: dict[str, ModuleType], trial: Any
) -> None:
    needed = trial.newest_needs()
    damages = [damage for damage in all_damages(bench, trial) if damage.file in needed]
    chosen = random.Random(7).sample(damages, 40)
    found = [trial.rot(damage, number % 2) for number, damage in enumerate(chosen)]
    refused = [outcome for outcome in found if outcome is not None]
    assert [outcome for outcome in refused if not outcome.ok] == []
    assert len(refused) > 20
