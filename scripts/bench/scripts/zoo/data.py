"""One process: kinds of data, with randomness in the workers that load it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import autoglm_resume as autoglm

from .registry import Program, program
from .usual import net

SIZE = 64
BATCH = 6


class Augmented(Dataset[torch.Tensor]):
    """Noise by torch and by NumPy on every sample."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.randn(8) + torch.from_numpy(numpy.random.randn(8)).float()
        return torch.full((8,), float(index)) / SIZE + 0.1 * noise


def trained_on(loader: DataLoader[torch.Tensor], /, **more: object) -> Program:
    """A loop that takes the loader's next batch at every step, epoch after epoch."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches: list[Iterator[torch.Tensor]] = []
    seen: list[float] = []

    def next_batch() -> torch.Tensor:
        if not batches:
            batches.append(iter(loader))
        try:
            return next(batches[0])
        except StopIteration:
            batches[0] = iter(loader)
            return next(batches[0])

    def step(_: int) -> float:
        x = next_batch()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(float(x.sum()))
        return seen[-1]

    return Program({"model": model, "optimizer": optimizer, **more}, step)


def sampler(*, endless: bool = True) -> autoglm.ResumableSampler:
    """Over the samples, shuffled."""
    return autoglm.ResumableSampler(SIZE, BATCH, seed=3, endless=endless)


@program()
def in_process() -> Program:
    """No workers: the noise comes from the generators of the training."""
    order = sampler()
    return trained_on(DataLoader(Augmented(), batch_sampler=order), sampler=order)


@program()
def workers() -> Program:
    """Two workers that add noise, one epoch after the other."""
    order = sampler(endless=False)
    return trained_on(DataLoader(Augmented(), batch_sampler=order, num_workers=2), sampler=order)


@program()
def persistent_workers() -> Program:
    """Two that stay, and a sampler without end."""
    order = sampler()
    return trained_on(
        DataLoader(Augmented(), batch_sampler=order, num_workers=2, persistent_workers=True),
        sampler=order,
    )


@program(needs=("torchdata",))
def stateful_loader() -> Program:
    """torchdata's loader, which is tracked itself; in the process."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        Augmented(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    return trained_on(loader, loader=loader)


@program(needs=("torchdata",))
def stateful_workers() -> Program:
    """The same with two workers, and noise in them."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        Augmented(),
        BATCH,
        shuffle=True,
        num_workers=2,
        generator=torch.Generator().manual_seed(1),
    )
    return trained_on(loader, loader=loader)


class Stream(IterableDataset[torch.Tensor]):
    """Numbers that are made up as they are asked for; knows where it is."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            yield torch.full((8,), self.position % 17 / 17)

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self.position = state["position"]


@program()
def iterable() -> Program:
    """A stream that is tracked itself; no batch is drawn ahead."""
    stream = Stream()
    return trained_on(DataLoader(stream, BATCH), stream=stream)
