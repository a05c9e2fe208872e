"""An optimizer that steps and is not tracked is said, where that loses anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from tests.worker.alone import end_process, lonely


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Opaque:
    """Knows what it saves by a closure only."""

    def __init__(self, *saved: Any) -> None:
        self.saved = lambda: saved

    def state_dict(self) -> list[Any]:
        return [each.state_dict() for each in self.saved()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Nothing is loaded here."""


def trained(kind: str, steps: int = 20) -> None:
    """A loop that tracks the optimizers of `kind`."""
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    session = autoglm.init(checkpoint_dir="ckpt")
    tracked: dict[str, Any] = {"model": model, "adam": adam}
    stepping = [lambda step: adam]
    match kind:
        case "forgotten":
            del tracked["adam"]
        case "only its scheduler":
            tracked["adam"] = torch.optim.lr_scheduler.StepLR(adam, 3)
        case "forgotten, without state":
            del tracked["adam"]
            sgd = torch.optim.SGD(model.parameters())
            stepping = [lambda step: sgd]
        case "replaced":
            new = torch.optim.SGD(other.parameters())
            stepping = [lambda step: adam if step < 5 else new]
        case "held":
            tracked = {"it": Opaque(model, adam)}
        case "in turns":
            rival = torch.optim.Adam(other.parameters())
            stepping = [lambda step: rival, lambda step: None if step % 5 else adam]
        case "probed":
            probe = torch.optim.Adam(other.parameters())
            stepping = [lambda step: adam, lambda step: probe]
    session.track(**tracked)
    for step in session.steps(steps):
        for each in stepping:
            if (optimizer := each(step)) is not None:
                for parameter in (*model.parameters(), *other.parameters()):
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
    end_process()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("forgotten", "(Adam) has stepped that is not tracked: its state is in no checkpoint"),
        ("only its scheduler", "(Adam) has stepped that is not tracked: its state"),
        ("replaced", "(SGD) has stepped that is not tracked, nor are its parameters"),
    ],
)
def test_an_optimizer_that_is_not_tracked_is_said_once(
    kind: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(kind)
    said = capfd.readouterr().err
    assert said.count(says) == said.count("steps in a row") == 1


@pytest.mark.parametrize(
    "kind", ["usual", "forgotten, without state", "held", "in turns", "probed"]
)
def test_an_optimizer_that_loses_nothing_is_not(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(kind)
    assert "steps in a row" not in capfd.readouterr().err
