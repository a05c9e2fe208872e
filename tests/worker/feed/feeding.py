"""Trainings that are killed and started again, and what each of their steps was fed.

    python feeding.py OUT LOOP:FEED[:DIE_AT…] …

Every life is a process of its own, forked here, where torch is imported once. A life that is to die
kills itself after the step DIE_AT, when that step's checkpoint is committed. In OUT, `undisturbed`
and `killed` get a line per step: the step, the batch, what the training itself drew, the loss.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch._dynamo  # as the first optimizer of a process would: here, once for all lives
from torch.utils.data import DataLoader, Dataset

import autoglm_resume as autoglm

TOTAL = 20
SAMPLES, BATCH = 29, 4  # 8 batches in an epoch, the last one of a single sample


class Noisy(Dataset[torch.Tensor]):
    """Every sample is augmented, by all three generators that people use."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = (random.random(), numpy.random.rand(), float(torch.rand(())))
        return torch.tensor((float(index), *noise), dtype=torch.float64)


class NoisyAtOnce(Noisy):
    """As Hugging Face's data sets give a batch."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        noise = torch.rand(len(indices)).tolist()
        return [self[i] + n for i, n in zip(indices, noise, strict=True)]


def masked(samples: list[torch.Tensor]) -> torch.Tensor:
    """As a collator for masked language models: with draws of its own."""
    batch = torch.stack(samples)
    return batch * torch.rand(len(batch), 1)


class Training:
    """One life."""

    def __init__(self, feed: str, out: Path, die_at: int | None) -> None:
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        self.out, self.die_at = out, die_at
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout()).double()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.session = autoglm.init(checkpoint_dir=f"{out}.ckpt", every_steps=1)
        self.data = FEEDS[feed](self)
        self.session.track(model=self.model, optimizer=optimizer, **self.data.tracked)
        self.optimizer = optimizer

    def step(self, step: int, batch: torch.Tensor) -> None:
        loss = self.model(batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        drawn = [random.random(), numpy.random.rand(), *torch.rand(2).tolist()]
        with self.out.open("a") as file:
            file.write(json.dumps([step, batch.tolist(), drawn, loss.item()]) + "\n")

    def after(self) -> None:
        """A step was counted."""
        if self.session.step - 1 == self.die_at:
            assert self.session._saves.failure(self.session._id(), wait=True) is None
            os.kill(os.getpid(), signal.SIGKILL)


class Sampled:
    """A DataLoader over a ResumableSampler."""

    def __init__(self, endless: bool, **options: Any) -> None:
        data = options.pop("data", Noisy)()
        self.sampler = autoglm.ResumableSampler(SAMPLES, BATCH, seed=3, endless=endless)
        self.loader = DataLoader(data, batch_sampler=self.sampler, collate_fn=masked, **options)
        self.tracked = {"sampler": self.sampler}

    def epochs(self, step: int) -> range:
        return range(self.sampler.epoch, 3)


class Stateful:
    """A loader that keeps its position by itself, as torchdata's does."""

    def __init__(self, **options: Any) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        self.loader = StatefulDataLoader(Noisy(), BATCH, shuffle=True, collate_fn=masked, **options)
        self.tracked = {"loader": self.loader}

    def epochs(self, step: int) -> range:
        return range(step // len(self.loader), 3)


def stateful(**options: Any) -> Any:
    return lambda training: Stateful(**options)


def sampled(**options: Any) -> Any:
    return lambda training: Sampled(training.endless, **options)


FEEDS: dict[str, Any] = {
    "main": sampled(),
    "workers": sampled(num_workers=2),
    "persistent": sampled(num_workers=2, persistent_workers=True, prefetch_factor=3),
    "spawned": sampled(num_workers=1, multiprocessing_context="spawn"),
    "stateful": stateful(),
    "stateful-workers": stateful(num_workers=2),
    "stateful-seeded": stateful(generator=torch.Generator().manual_seed(1)),
    "stateful-persistent": stateful(num_workers=2, persistent_workers=True),
    "at-once": sampled(num_workers=2, data=NoisyAtOnce),
    "at-once-main": sampled(data=NoisyAtOnce),
}


def counted(training: Training) -> Iterator[int]:
    """The steps, with a look after each."""
    for step in training.session.steps(TOTAL):
        if training.session.step == step:
            training.after()
        yield step


def iterator_first(training: Training) -> None:
    batches = iter(training.data.loader)
    for step in counted(training):
        training.step(step, next(batches))


def iterator_after_resume(training: Training) -> None:
    training.session.resume()
    batches = iter(training.data.loader)
    for step in counted(training):
        training.step(step, next(batches))


def loader_first(training: Training) -> None:
    for batch, step in zip(training.data.loader, counted(training), strict=False):
        training.step(step, batch)


def steps_first(training: Training) -> None:
    for step, batch in zip(counted(training), training.data.loader, strict=False):
        training.step(step, batch)


def epochs(training: Training) -> None:
    step = training.session.resume()
    for _ in training.data.epochs(step):
        for batch in training.data.loader:
            training.step(step, batch)
            training.session.step_done(step)
            training.after()
            step += 1
    training.session.save()


def session_epochs(training: Training) -> None:
    session = training.session
    for _ in session.epochs(3):
        training.after()  # the last step of the epoch before is complete only now
        for batch in training.data.loader:
            training.step(session.step, batch)
            session.step_done()
            training.after()


LOOPS = {f.__name__: f for f in (iterator_first, iterator_after_resume, loader_first, steps_first)}
LOOPS |= {"epochs": epochs, "session_epochs": session_epochs}


def live(loop: str, feed: str, out: Path, die_at: int | None) -> int:
    """One life, in a process of its own; returns its status as os.waitpid does."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        # Its workers look only every five seconds whether it lives, and hold its lock until then.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return status
    os.setsid()
    code = 1
    with contextlib.suppress(SystemExit):
        Training.endless = not loop.endswith("epochs")
        LOOPS[loop](Training(feed, out, die_at))
        code = 0
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        loop, feed, *deaths = case.split(":")
        out = Path(sys.argv[1], f"{loop}-{feed}")
        out.mkdir()
        assert live(loop, feed, out / "undisturbed", None) == 0, case
        for die_at in map(int, deaths):
            assert live(loop, feed, out / "killed", die_at) == signal.SIGKILL, case
        assert live(loop, feed, out / "killed", None) == 0, case
