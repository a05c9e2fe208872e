"""A loop over epochs that passes over those that are complete ends as if it had not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from tests.worker.alone import end_process, lonely

STEPS, EPOCHS = 3, 4


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Died(Exception):
    """As a process does."""


def trained(directory: str, die_at: int | None = None) -> dict[str, Any]:
    """What the objects are at the end; a scheduler and an average step after each epoch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    session = autoglm.init(checkpoint_dir=directory, every_steps=1)
    session.track(model=model, averaged=averaged, optimizer=optimizer, scheduler=scheduler)
    for epoch in range(EPOCHS):
        for step in session.steps((epoch + 1) * STEPS):
            if step == die_at:
                raise Died
            optimizer.zero_grad()
            model(torch.randn(4, 2)).square().sum().backward()
            optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
    return {
        "model": model.weight.tolist(),
        "averaged": [averaged.module.weight.tolist(), int(averaged.n_averaged)],
        "scheduler": scheduler.state_dict(),
        "rate": optimizer.param_groups[0]["lr"],
    }


@pytest.mark.parametrize("die_at", [1, 4, 7, 8, 10])
def test_what_a_loop_does_besides_in_an_epoch_is_done_once(die_at: int) -> None:
    whole = trained("whole")
    end_process()
    with pytest.raises(Died):
        trained("killed", die_at)
    end_process()
    assert trained("killed") == whole


def test_what_follows_the_last_step_of_an_epoch_is_not_lost_with_a_kill_in_the_next() -> None:
    whole = trained("whole")
    end_process()
    with pytest.raises(Died):
        trained("killed", 2 * STEPS)  # the newest checkpoint is of the epoch's last step
    end_process()
    assert trained("killed") == whole
