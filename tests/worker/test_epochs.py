"""A loop over epochs as people write it: alone, one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from tests.worker.alone import checkpoints, end_process, lonely

EPOCHS = 3
STEPS = 4
"""In each."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Died(Exception):
    pass


class Training:
    """Every step makes a parameter larger by one; every epoch is evaluated."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.sampler = autoglm.ResumableSampler(8, 2)
        self.session = autoglm.init(checkpoint_dir="ckpt", every_steps=1)
        self.session.track(model=self.model, optimizer=self.optimizer, sampler=self.sampler)
        self.trained: list[tuple[int, int]] = []
        self.evaluated: list[tuple[int, int]] = []
        """Epoch, and the updates that the model had."""

    def run(self, *, die_in: int | None = None, stop_after: int | None = None) -> None:
        loader = torch.utils.data.DataLoader(list(range(8)), batch_sampler=self.sampler)
        for epoch in self.session.epochs(EPOCHS):
            for batch in loader:
                self.model.bias.grad = torch.tensor([-1.0])
                self.optimizer.step()
                self.trained += [(epoch, int(sample)) for sample in batch]
                self.session.step_done()
            if epoch == die_in:
                raise Died
            self.evaluated.append((epoch, int(self.model.bias.item())))
            self.session.report(accuracy=epoch)
            if epoch == stop_after:
                break


def test_every_epoch_has_all_samples_and_its_evaluation() -> None:
    training = Training()
    training.run()
    assert sorted(training.trained) == [(e, sample) for e in range(EPOCHS) for sample in range(8)]
    assert training.evaluated == [(0, 4), (1, 8), (2, 12)]
    assert training.session.step == EPOCHS * STEPS
    assert step_of(checkpoints()[-1]) == EPOCHS * STEPS


def test_an_evaluation_that_was_cut_off_comes_again_and_no_step_is_lost_or_doubled() -> None:
    first = Training()
    with pytest.raises(Died):
        first.run(die_in=1)
    saved = step_of(checkpoints()[-1])
    assert saved < 2 * STEPS, "the last step of the epoch is not complete"
    again = Training()
    again.run()
    assert again.evaluated[-2:] == [(1, 8), (2, 12)]
    kept = first.trained[: 2 * saved] + again.trained
    assert sorted(kept) == [(e, sample) for e in range(EPOCHS) for sample in range(8)]


def test_what_an_evaluation_reports_is_of_the_epochs_last_step() -> None:
    Training().run(stop_after=0)
    newest = checkpoints()[-1]
    store = Store(Path("ckpt"))
    assert step_of(newest) == STEPS
    assert store.load_manifest(store.directory(newest)).metrics == {"accuracy": 0.0}


def test_a_loop_that_is_left_after_an_epoch_is_saved_and_goes_on_with_the_next() -> None:
    Training().run(stop_after=1)
    end_process()
    again = Training()
    again.run()
    assert again.evaluated == [(2, 12)]


def test_a_save_at_the_end_of_an_epoch_is_of_its_last_step() -> None:
    training = Training()
    for epoch in training.session.epochs(2):
        for _ in training.sampler:
            training.model.bias.grad = torch.tensor([-1.0])
            training.optimizer.step()
            training.session.step_done()
        assert training.session.save()
        assert training.session.step == (epoch + 1) * STEPS - 1
    assert training.session.step == 2 * STEPS


def test_a_run_that_is_complete_trains_nothing_more() -> None:
    Training().run()
    end_process()
    again = Training()
    again.run()
    assert (again.trained, again.evaluated) == ([], [])


def test_without_a_sampler_that_ends_nobody_knows_the_epoch() -> None:
    session = autoglm.init(checkpoint_dir="ckpt")
    session.track(sampler=autoglm.ResumableSampler(8, 2, endless=True))
    with pytest.raises(UsageError, match="not endless") as refused:
        next(session.epochs(3))
    assert "session.resume() // len(loader)" in refused.value.hint
