"""A save within an accumulation window loses nothing of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.worker.state.pending_gradients import GRADIENTS
from tests.worker.alone import checkpoints, end_process, lonely

WINDOW = 4


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


def begin(every: int) -> tuple[autoglm.Session, torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = autoglm.init(checkpoint_dir="ckpt", every_steps=every)
    session.track(model=model, optimizer=optimizer)
    return session, model, optimizer


def train(until: int, every: int = 3) -> list[torch.Tensor]:
    """Micro-batches are what is counted; the optimizer steps after every fourth."""
    session, model, optimizer = begin(every)
    for step in range(session.resume(), until):
        model(torch.randn(3, 4)).square().mean().backward()
        if (step + 1) % WINDOW == 0:
            optimizer.step()
            optimizer.zero_grad()
        session.step_done(step)
    end_process()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("stop", [3, 6, 9, 11])
def test_a_run_that_resumes_within_a_window_ends_like_one_that_was_not_disturbed(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(16)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    train(stop)
    resumed = train(16)
    assert all(map(torch.equal, undisturbed, resumed))


def test_gradients_that_a_step_has_used_are_not_saved() -> None:
    session, model, optimizer = begin(1)
    for _ in session.steps(3):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    assert GRADIENTS not in session._tracked.state().objects
    store = Store(Path("ckpt"))
    for name in checkpoints():
        assert GRADIENTS not in store.load_part(store.directory(name), 0).objects


def test_sparse_gradients_are_pending_too() -> None:
    def train(until: int) -> torch.Tensor:
        torch.manual_seed(0)
        words = torch.nn.Embedding(50, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(words.parameters(), lr=1e-2)
        session = autoglm.init(checkpoint_dir=directory, every_steps=1)
        session.track(model=words, optimizer=optimizer)
        for step in range(session.resume(), until):
            words(torch.randint(0, 50, (3,))).square().sum().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            session.step_done(step)
        end_process()
        return words.weight.detach().clone()

    directory = "undisturbed"
    undisturbed = train(4)
    directory = "disturbed"
    train(3)
    assert torch.equal(train(4), undisturbed)


def test_gradients_without_a_forward_pass_that_is_seen_are_pending_where_no_step_came() -> None:
    session, model, optimizer = begin(1)
    session.resume()
    for step in range(3):
        model[1](model[0](torch.randn(3, 4))).square().mean().backward()  # type: ignore[index]
        if step == 0:
            optimizer.step()
        session.step_done(step)
        assert bool(session._tracked.gradients.state()) == (step > 0)


def test_gradients_are_pending_after_a_step_that_a_scaler_left_out() -> None:
    session, model, optimizer = begin(1)
    session.resume()
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    session.step_done(0)
    model(torch.randn(3, 4)).square().mean().backward()
    assert set(session._tracked.gradients.state()["model"]) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }


class Loop:
    """`kind` of a loop, over random batches; what it trains is `model`."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2), "b": torch.nn.Linear(4, 2)})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.heads = [self.model["a"], self.model["b"]]
        self.tracked: dict[str, object] = {"model": self.model, "optimizer": self.optimizer}
        if kind.startswith("held"):
            self.tracked = {"trainer": Holder(self.model, self.optimizer, deep="deep" in kind)}
        elif "by hand" in kind:
            del self.tracked["optimizer"]
        elif "bucket" in kind:  # as those of DistributedDataParallel
            bucket = torch.zeros(20)
            for parameter, part in zip(
                self.model.parameters(), bucket.split([8, 2] * 2), strict=True
            ):
                parameter.grad = part.view_as(parameter)

    def backward(self, head: torch.nn.Module) -> None:
        head(torch.randn(3, 4)).square().mean().backward()

    def step(self, step: int) -> None:
        parameters, optimizer = list(self.model.parameters()), self.optimizer
        match self.kind:
            case "held" | "held deep":
                self.backward(self.heads[0])
                if step % 3 == 2:
                    optimizer.step()
                    optimizer.zero_grad()
            case "accumulated by hand":
                self.backward(self.heads[0])
                if step % 3 == 2:
                    for parameter in self.model["a"].parameters():
                        parameter.data -= 0.1 * parameter.grad  # type: ignore[operator]
                        parameter.grad = None
            case "zeroed at the end":
                self.backward(self.heads[step // 2 % 2])
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            case "one head zeroed":
                self.backward(self.heads[step // 2 % 2])
                optimizer.step()
                self.heads[0].zero_grad(set_to_none=False)
                self.heads[1].zero_grad()
            case "decaying":
                self.backward(self.heads[0])
                optimizer.step()
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.9)
            case "never cleared" | "never cleared, in a bucket":
                self.backward(self.heads[step % 2])
                optimizer.step()
            case "cleared first":
                optimizer.zero_grad()
                self.backward(self.heads[0])
                torch.nn.utils.clip_grad_norm_(parameters, 0.1)
                optimizer.step()
            case "cleared between the passes":
                loss = self.heads[0](torch.randn(3, 4)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            case "zeroed first":
                optimizer.zero_grad(set_to_none=False)
                self.backward(self.heads[0])
                optimizer.step()
            case "cleared at the end":
                self.backward(self.heads[0])
                optimizer.step()
                optimizer.zero_grad()

    def train(self, until: int) -> list[torch.Tensor]:
        session = autoglm.init(checkpoint_dir="ckpt", every_steps=1)
        session.track(**self.tracked)
        for step in range(session.resume(), until):
            self.step(step)
            session.step_done(step)
            self.pending = session._tracked.gradients.state()
        end_process()
        return [parameter.detach().clone() for parameter in self.model.parameters()]


class Holder:
    """A trainer of a script's own."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, deep: bool
    ) -> None:
        self.parts = {"models": [model], "steps": (optimizer,)} if deep else None
        self.model, self.optimizer = (None, None) if deep else (model, optimizer)
        self.all = (model, optimizer)

    def state_dict(self) -> list[object]:
        return [each.state_dict() for each in self.all]

    def load_state_dict(self, state: list[dict[str, object]]) -> None:
        for each, saved in zip(self.all, state, strict=True):
            each.load_state_dict(saved)


STATE = [
    "held",
    "held deep",
    "accumulated by hand",
    "zeroed at the end",
    "one head zeroed",
    "decaying",
    "never cleared",
    "never cleared, in a bucket",
]
USED = ["cleared first", "cleared between the passes", "zeroed first", "cleared at the end"]


@pytest.mark.parametrize("kind", STATE + USED)
def test_whatever_a_loop_does_to_its_gradients_it_resumes_to_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Loop(kind).train(10)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for stop in (4, 5):  # the second goes on for one step only
        Loop(kind).train(stop)
    assert all(map(torch.equal, undisturbed, Loop(kind).train(10)))


@pytest.mark.parametrize("kind", USED)
def test_gradients_that_the_next_step_will_clear_are_never_state(kind: str) -> None:
    loop = Loop(kind)
    for until in range(1, 5):
        loop.train(until)
        assert loop.pending == {}


def test_gradients_that_an_optimizer_of_nobodys_has_used_are_no_state() -> None:
    loop = Loop("cleared first")
    del loop.tracked["optimizer"]
    loop.train(2)
    assert loop.pending == {}


def test_a_model_that_is_copied_takes_no_hook_along() -> None:
    loop = Loop("cleared first")
    loop.train(3)
    told = copy.deepcopy(loop.model)
    again = pickle.loads(pickle.dumps(list(loop.model.parameters())))
    for parameter in (*told.parameters(), *again):
        assert not parameter._post_accumulate_grad_hooks
