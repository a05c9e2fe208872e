"""One process: kinds of loops, and of objects beside the model."""

from __future__ import annotations

import itertools

import torch
from torch.optim import swa_utils

from .registry import Program, program
from .usual import loss_of, net, usual


@program()
def schedule() -> Program:
    """A rate that follows the number of steps."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-1, total_steps=40)
    found = usual(model, optimizer, scheduler=scheduler)
    inner = found.step

    def step(n: int) -> object:
        seen = inner(n)
        scheduler.step()
        return seen

    found.step = step
    return found


@program()
def ema() -> Program:
    """Averaged weights, swapped in for an evaluation now and then, through `.data`."""
    model = net()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = usual(model, optimizer, averaged=averaged)
    inner = found.step

    def step(n: int) -> object:
        if n % 5 == 0:
            pairs = list(zip(model.parameters(), averaged.module.parameters(), strict=True))
            own = [p.data.clone() for p, _ in pairs]
            for p, mean in pairs:
                p.data.copy_(mean.data)
            model.eval()(torch.ones(1, 8))
            for (p, _), before in zip(pairs, own, strict=True):
                p.data.copy_(before)
            model.train()
        seen = inner(n)
        averaged.update_parameters(model)
        return seen

    found.step = step
    return found


@program()
def swa() -> Program:
    """Weights averaged from a step on, with a rate of their own."""
    model = net()
    averaged = swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rates = swa_utils.SWALR(optimizer, swa_lr=5e-2, anneal_epochs=4)
    found = usual(model, optimizer, averaged=averaged, rates=rates)
    inner = found.step

    def step(n: int) -> object:
        seen = inner(n)
        if n >= 10:
            averaged.update_parameters(model)
            rates.step()
        return seen

    found.step = step
    return found


@program()
def gan() -> Program:
    """Two models, two optimizers, one of which steps every third time."""
    maker, judge = net(), torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Linear(8, 1))
    makes = torch.optim.Adam(maker.parameters(), lr=1e-3)
    judges = torch.optim.RMSprop(judge.parameters(), lr=1e-3)

    def step(n: int) -> float:
        fake = maker(torch.randn(6, 8))
        judging = judge(torch.randn(6, 1)).mean() - judge(fake.detach()).mean()
        judges.zero_grad()
        judging.backward()
        judges.step()
        if n % 3 == 0:
            makes.zero_grad()
            judge(fake).mean().backward()
            makes.step()
        return float(judging)

    return Program({"maker": maker, "judge": judge, "makes": makes, "judges": judges}, step)


@program()
def accumulation() -> Program:
    """Micro-batches are the steps; four of them make an update."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(n: int) -> float:
        loss = loss_of(model)
        loss.backward()
        if n % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer}, step, steps=32)


@program()
def scaler() -> Program:
    """A loss scale that overflows now and then, and leaves that step out."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=3)

    def step(_: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer, "scaler": scale}, step)


@program()
def freezing() -> Program:
    """From step 12 on, half of the model is frozen."""
    model = net()
    found = usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    inner = found.step

    def step(n: int) -> object:
        model[0].requires_grad_(n < 12)
        return inner(n)

    found.step = step
    return found


@program(refused="only in the checkpoint")
def growing() -> Program:
    """From step 3 on there is a layer more, and a group of the optimizer for it: a script that
    does not make it again before it resumes has another model."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = usual(model, optimizer)
    inner = found.step

    def step(n: int) -> object:
        if n >= 3 and len(model) == 4:
            layer = torch.nn.Linear(1, 1)
            model.append(layer)
            optimizer.add_param_group({"params": list(layer.parameters())})
        return inner(n)

    found.step = step
    return found


@program()
def early_stopping() -> Program:
    """Breaks out of its loop when enough is enough, and goes on to use the model."""
    model = net()
    found = usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    found.stop = lambda step: step == 21
    return found


class History:
    """What a script writes down as it goes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.best: dict[str, object] = {}

    def state_dict(self) -> dict[str, object]:
        """All of it, more with every step."""
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on with it."""
        self.losses, self.best = state["losses"], state["best"]  # type: ignore[assignment]


@program()
def growing_log() -> Program:
    """A tracked object whose state grows by some 100 KB with every step."""
    model, history = net(), History()
    found = usual(model, torch.optim.SGD(model.parameters(), lr=1e-2), history=history)
    inner = found.step

    def step(n: int) -> object:
        seen = inner(n)
        history.losses += torch.rand(5000).double().tolist()
        history.best = {"step": n, "weights": [p.detach().clone() for p in model.parameters()]}
        return seen

    found.step = step
    found.final = lambda: history.losses[::1000]
    return found


@program()
def counters() -> Program:
    """Iterators, deques and numbers that a script wants back, in an object of its own."""

    class State:
        def __init__(self) -> None:
            self.seen: set[int] = set()
            self.window: list[float] = []

        def state_dict(self) -> dict[str, object]:
            return {"seen": self.seen, "window": tuple(self.window)}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.seen = state["seen"]  # type: ignore[assignment]
            self.window = list(state["window"])  # type: ignore[call-overload]

    model, state = net(), State()
    found = usual(model, torch.optim.NAdam(model.parameters(), lr=1e-2), state=state)
    inner = found.step

    def step(n: int) -> object:
        seen = inner(n)
        state.seen.add(n % 7)
        state.window = list(itertools.islice((*state.window, float(str(seen))), 50))
        return seen

    found.step = step
    found.final = lambda: (sorted(state.seen), state.window)
    return found
