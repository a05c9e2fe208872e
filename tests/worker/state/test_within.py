"""Which modules and optimizers a tracked object of a script's own holds."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from autoglm_resume.worker.state import within as looking
from autoglm_resume.worker.state.within import within


class Own:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def state_dict(self) -> None: ...

    def load_state_dict(self, _: None) -> None: ...


def test_modules_and_optimizers_are_found_wherever_an_object_holds_them() -> None:
    a, b, c = (torch.nn.Linear(1, 1) for _ in range(3))
    adam, sgd = torch.optim.Adam(a.parameters()), torch.optim.SGD(b.parameters())
    own = Own(model=a, steps=[adam, {"second": (sgd,)}], more=Own(deep=b), tracked=c, name="x")
    found = within({"own": own, "c": c})
    assert {name: id(obj) for name, obj in found.items()} == {
        "own.model": id(a),
        "own.steps.0": id(adam),
        "own.steps.1.second.0": id(sgd),
        "own.more.deep": id(b),
    }


def test_an_object_is_named_once_and_what_is_no_state_of_its_holder_not_at_all() -> None:
    model = torch.nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1)
    assert within({"own": Own(one=model, two=model), "scheduler": scheduler}).keys() == {"own.one"}
    assert within({"own": Own(scheduler=scheduler, other=object())}) == {}


def test_a_holder_of_itself_and_of_a_long_log_is_looked_at_in_no_time() -> None:
    own = Own(model=torch.nn.Linear(1, 1))
    own.log = [[[[0.0] * 99] * 99] * 99] * 99  # type: ignore[attr-defined]
    own.self = own  # type: ignore[attr-defined]
    budget = iter(range(10**9))
    assert [name for name, _ in looking._members("own", own, 4, itertools.islice(budget, 500))] == [
        "own.model"
    ]
    assert next(budget) <= 501
