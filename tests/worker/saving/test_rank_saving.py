"""A rank's saves through a real saver of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.checkpoint.state.capture import Identity
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.saving import stager as module
from autoglm_resume.worker.saving.stager import Stager

Make = Callable[..., Stager]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    def saving(timeout: float = 600.0) -> Stager:
        checkpoint = Checkpointing(str(tmp_path), options=SaveOptions("off", timeout=timeout))
        settings = Settings(0, 1, checkpoint, None, True, (), "a0", None)
        return Stager(settings, None, lambda: None)

    yield saving
    for saver in psutil.Process().children():
        saver.kill()
        saver.wait()


def begin(saving: Stager, step: int) -> str:
    state = capture.gather({"m": {"w": torch.full((1000,), float(step))}})
    identity = Identity(checkpoint_id(step, "a0"), 0, 1)
    saving.begin(state, identity, 0.0)
    return identity.id


def the_saver() -> psutil.Process:
    (process,) = psutil.Process().children()
    return process


def test_a_save_is_over_when_its_saver_says_so(make: Make, tmp_path: Path) -> None:
    saving = make()
    ids = [begin(saving, step) for step in (1, 2, 3)]
    saving.wait()
    assert [(outcome.id, outcome.ok) for outcome in saving.outcomes()] == [(i, True) for i in ids]
    assert [path.name for path in Store(tmp_path).committed()] == ids[::-1]


def test_a_saver_that_hangs_is_not_waited_for_for_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    saving = make(timeout=0.1)
    begin(saving, 1)
    saving.wait()
    saver = the_saver()
    saver.suspend()
    id = begin(saving, 2)
    saving.wait()
    failed = saving.outcomes()[-1]
    assert (failed.id, failed.ok) == (id, False)
    assert "has not answered" in failed.reason
    saver.resume()


def test_a_description_that_grows_gets_larger_slots(make: Make, tmp_path: Path) -> None:
    saving, log = make(), list[float]()
    for step in range(1, 8):
        log += [step / 7] * 20_000
        state = capture.gather({"m": {"w": torch.full((10,), float(step)), "log": log}})
        saving.begin(state, Identity(checkpoint_id(step, "a0"), 0, 1), 0.0)
    saving.wait()
    assert [outcome.ok for outcome in saving.outcomes()] == [True] * 7
    assert Store(tmp_path).committed()[0].name == checkpoint_id(7, "a0")
