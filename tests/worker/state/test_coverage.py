"""What is being trained is tracked, or the training is refused before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.errors import UsageError
from tests.worker.alone import lonely


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


def begun(**tracked: Any) -> None:
    session = autoglm.init(checkpoint_dir="ckpt")
    session.track(**tracked)
    assert session.resume() == 0


def adam(*modules: torch.nn.Module, more: Any = ()) -> torch.optim.Optimizer:
    return torch.optim.Adam([*(p for m in modules for p in m.parameters()), *more])


class Trainer:
    """Holds a model and an optimizer, and saves both, and a parameter of its own."""

    def __init__(self, *, saves: bool) -> None:
        self.model, self.scale, self.saves = (
            torch.nn.Linear(2, 2),
            torch.nn.Parameter(torch.ones(3)),
            saves,
        )
        self.optimizer = adam(self.model, more=[self.scale])

    def state_dict(self) -> dict[str, Any]:
        own = {"scale": self.scale.detach()} if self.saves else {}
        return {"model": self.model.state_dict(), "adam": self.optimizer.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is loaded here."""


def test_a_parameter_that_nothing_tracked_holds_is_refused_with_its_shape() -> None:
    encoder, head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 7)
    sigma = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(
        UsageError, match=r"optimizer, group 0, parameter 2 of shape \(7, 3\); .*\(7,\)"
    ):
        begun(encoder=encoder, optimizer=adam(encoder, head))
    with pytest.raises(UsageError, match=r"parameter 4 of shape \(5,\)"):
        begun(
            model=torch.nn.ModuleList([encoder, head]), optimizer=adam(encoder, head, more=[sigma])
        )
    groups = [{"params": encoder.parameters()}, {"params": head.parameters()}]
    with pytest.raises(UsageError, match=r"adam, group 1, parameter 0 of shape \(7, 3\)"):
        begun(encoder=encoder, adam=torch.optim.Adam(groups))
    with pytest.raises(
        UsageError, match=r"trainer\.optimizer, group 0, parameter 2 of shape \(3,\)"
    ):
        begun(trainer=Trainer(saves=False))


def test_whatever_holds_it_is_enough() -> None:
    encoder, head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 7)
    sigma = torch.nn.Parameter(torch.zeros(5))
    begun(
        model=torch.nn.ModuleList([encoder, head]),
        sigma=torch.nn.ParameterDict({"log": sigma}),
        optimizer=adam(encoder, head, more=[sigma]),
    )
    begun(trainer=Trainer(saves=True))
    frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    begun(encoder=encoder, optimizer=adam(encoder, more=[frozen]))
    begun(encoder=torch.nn.parallel.DataParallel(encoder), optimizer=adam(encoder))


def test_a_lazy_module_that_has_seen_no_batch_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 1))
    with pytest.raises(UsageError, match=r"model\.0\.weight has no shape yet") as refused:
        begun(model=model)
    assert "run one batch" in (refused.value.hint or "")
    model(torch.zeros(1, 3))
    begun(model=model)


def test_an_optimizer_whose_state_is_elsewhere_is_refused_when_it_is_tracked() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Named as that of torch, which wants a process group."""

    model = torch.nn.Linear(2, 1)
    with pytest.raises(UsageError, match="before it is consolidated"):
        begun(model=model, optimizer=ZeroRedundancyOptimizer(model.parameters()))
