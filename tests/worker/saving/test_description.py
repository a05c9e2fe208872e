"""A state is described anew when, and only when, its description would be another."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.document import compact
from autoglm_resume.checkpoint.state.capture import state_of
from autoglm_resume.worker.saving.description import Description, description_of
from autoglm_resume.worker.state.tracked import TrackedObjects


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.again = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(x)))


Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.randn(5, 4)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def assert_true(description: Description) -> None:
    """That it is what describing the object anew gives."""
    found = description.state()
    fresh = state_of(description.name, description.obj.state_dict())
    assert found.tree == fresh.tree
    assert b"".join(found.text) == compact(fresh.tree) == b"".join(fresh.text)
    assert [name for name, _ in found.table.tensors] == [name for name, _ in fresh.table.tensors]
    for (name, mine), (_, theirs) in zip(found.table.tensors, fresh.table.tensors, strict=True):
        assert mine.data_ptr() == theirs.data_ptr(), name
        assert (mine.dtype, mine.shape, mine.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_described_truly_whatever_its_steps_and_schedulers_change(
    kind: str,
) -> None:
    model = Tied()
    optimizer = OPTIMIZERS[kind](model.parameters())
    described = description_of("optimizer", optimizer)
    assert_true(described)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        step(model, optimizer)
        scheduler.step()
        assert_true(described)


@pytest.mark.parametrize("kind", ["adamw", "fused", "momentum", "rate in a tensor"])
def test_what_stays_the_same_is_described_once(kind: str) -> None:
    model = Tied()
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer)
    tracked = TrackedObjects()
    tracked.add("model", model, lambda: None, str, print)
    tracked.add("optimizer", optimizer, lambda: None, str, print)
    before = tracked.state().objects
    for _ in range(3):
        step(model, optimizer)
        now = tracked.state().objects
        assert now["model"] is before["model"]
        assert now["optimizer"].table is before["optimizer"].table


CHANGES: dict[str, Callable[[Tied], Any]] = {
    "other memory": lambda m: setattr(m.first.weight, "data", m.first.weight.data.clone()),
    "turned": lambda m: setattr(m.first.weight, "data", m.first.weight.data.t()),
    "another type": lambda m: m.half(),
    "same bytes, another type": lambda m: setattr(
        m.norm, "running_mean", m.norm.running_mean.view(torch.int32)
    ),
    "frozen": lambda m: m.first.weight.requires_grad_(False),
    "another parameter": lambda m: setattr(m.norm, "weight", torch.nn.Parameter(torch.ones(4))),
    "one more": lambda m: setattr(m, "more", torch.nn.Linear(2, 2)),
    "one deeper": lambda m: m.norm.register_buffer("more", torch.ones(2)),
    "one less": lambda m: delattr(m, "again"),
    "another name": lambda m: m._modules.update(moved=m._modules.pop("second")),
    "layer replaced": lambda m: setattr(m, "second", torch.nn.Linear(4, 4)),
    "shorter": lambda m: setattr(m.norm.weight, "data", m.norm.weight.data[:2]),
    "now saved": lambda m: m.register_buffer("scratch", m.scratch),
    "a hook": lambda m: m.register_state_dict_post_hook(
        lambda _m, state, *_: state.update(hooked=3)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changed_is_described_anew(change: str) -> None:
    model = Tied()
    described = description_of("model", model)
    assert_true(described)
    CHANGES[change](model)
    assert_true(described)
    assert_true(described)


class Asked(torch.nn.Linear):
    """Whose state nobody else can know."""

    count = 0

    def get_extra_state(self) -> dict[str, int]:
        self.count += 1
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def test_a_module_that_has_a_say_is_asked_every_time() -> None:
    model = torch.nn.Sequential(Asked(2, 2))
    described = description_of("model", model)
    counts = [described.state().tree["$module"][0]["$ordered"][-1][1]["count"] for _ in range(3)]
    assert counts == [1, 2, 3]


def copies(obj: Any) -> None:
    """A `state_dict` of the object's own, as of scripts that save adapters, or want copies."""
    before = obj.state_dict
    obj.state_dict = lambda *args, **kwargs: copy.deepcopy(before(*args, **kwargs))


def saves_itself(module: torch.nn.Linear) -> None:
    def save(state: dict[str, torch.Tensor], prefix: str, _: bool) -> None:
        state[f"{prefix}twice"] = 2 * module.weight.detach()

    vars(module)["_save_to_state_dict"] = save


PATCHES: dict[str, Callable[[Tied], Any]] = {
    "the model": copies,
    "a module in it": lambda m: copies(m.norm),
    "what a module saves": lambda m: saves_itself(m.second),
    "what a module says beside": lambda m: setattr(
        m.first, "get_extra_state", lambda: {"bias": m.norm.bias.detach().clone()}
    ),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_module_one_of_which_has_a_say_of_its_own_is_asked_every_time(patch: str) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    described = description_of("model", model)
    described.state()
    PATCHES[patch](model)
    for _ in range(2):
        step(model, optimizer)
        assert_equal(described)


def test_an_optimizer_that_has_a_say_of_its_own_is_asked_every_time() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    described = description_of("optimizer", optimizer)
    step(model, optimizer)
    described.state()
    copies(optimizer)
    for _ in range(2):
        step(model, optimizer)
        assert_equal(described)


def assert_equal(description: Description) -> None:
    """As `assert_true`, where the state is made of copies."""
    found = description.state()
    fresh = state_of(description.name, description.obj.state_dict())
    assert found.tree == fresh.tree
    for (name, mine), (_, theirs) in zip(found.table.tensors, fresh.table.tensors, strict=True):
        assert torch.equal(mine, theirs), name


def test_an_optimizer_that_gets_another_group_is_described_anew() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.first.parameters())
    described = description_of("optimizer", optimizer)
    step(model, optimizer)
    assert_true(described)
    optimizer.add_param_group({"params": list(model.norm.parameters()), "lr": 1.0})
    assert_true(described)
    step(model, optimizer)
    assert_true(described)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_true(described)


def test_a_lazy_module_is_asked_until_it_is_there() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LazyLinear(2))
    described = description_of("model", model)
    model(torch.ones(1, 4))
    assert_true(described)
    assert_true(described)


class Other:
    def __init__(self) -> None:
        self.values = OrderedDict(a=1)

    def state_dict(self) -> Any:
        return self.values


def test_any_other_object_is_asked_every_time() -> None:
    other = Other()
    described = description_of("other", other)
    assert_true(described)
    other.values["b"] = 2
    assert_true(described)


def test_only_what_an_optimizers_step_changes_is_marked_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=torch.tensor(0.1), foreach=False)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    model[0].bias.requires_grad_(False)
    tracked = TrackedObjects()
    tracked.add("model", model, lambda: None, str, print)
    tracked.add("optimizer", optimizer, lambda: None, str, print)
    objects = tracked.state().objects
    marked = {
        name
        for name in ("model", "optimizer")
        for (name, _), until in zip(
            objects[name].table.tensors, objects[name].table.until_step, strict=True
        )
        if until
    }
    assert marked == {
        "model/0.weight",
        *(f"optimizer/state.{n}.{k}" for n in (0, 1) for k in ("step", "exp_avg", "exp_avg_sq")),
    }
