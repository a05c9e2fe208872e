"""A save within an accumulation window loses nothing of it."""

from __future__ import annotations

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


def test_what_no_tracked_optimizer_steps_is_no_state() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    session = autoglm.init(checkpoint_dir="ckpt", every_steps=1)
    session.track(model=model)
    session.resume()
    model(torch.randn(3, 4)).square().mean().backward()
    assert session._tracked.gradients.state() == {}
