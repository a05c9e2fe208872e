"""A sampler that deals every sample once per epoch, however often training is interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from autoglm_resume.errors import UsageError


class ResumableSampler:
    """A batch sampler for `torch.utils.data.DataLoader(..., batch_sampler=sampler)`.

    Each global batch (`batch_size` times world size samples of the epoch's permutation) is dealt to
    the ranks in turn; the last one of an epoch may be smaller, and what would not give every rank
    a sample joins the batch before it. So nothing is padded, dropped, or seen twice.

    The position moves when a step is *done* (`Session.step_done` calls `advance` of every tracked
    sampler, so track the one of training only), not when an index is drawn: a DataLoader draws
    ahead, and a checkpoint must count only what was trained on. The position is a number of global
    samples.

    Give the DataLoader a `generator=` of its own: it draws a seed when it is iterated, and from
    the global generator that draw would happen once more after a resume.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        endless: bool = False,
        batches_per_step: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Deal `size` samples, `batch_size` per rank and batch.

        `endless` goes on with the next epoch instead of ending the iteration; `batches_per_step`
        is the number of batches a step consumes (gradient accumulation). Rank and world size come
        from torchrun's environment. Raises UsageError where a rank would get no sample.
        """
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.world_size = (
            int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        )
        if batch_size < 1 or size < self.world_size:
            raise UsageError(
                f"ResumableSampler: {size} samples in batches of {batch_size} cannot give each of "
                f"{self.world_size} ranks a sample"
            )
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.endless = endless
        self.batches_per_step = batches_per_step
        self.epoch = 0
        self.consumed = 0

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.consumed
        while True:
            order = self._order(epoch)
            while start < self.size:
                end = self._end(start)
                yield order[start + self.rank : end : self.world_size].tolist()
                start = end
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def advance(self) -> None:
        """Count one step's batches as consumed."""
        for _ in range(self.batches_per_step):
            self.consumed = self._end(self.consumed)
            if self.consumed >= self.size:
                self.epoch, self.consumed = self.epoch + 1, 0
                if not self.endless:
                    break  # the last step of an epoch may have fewer batches

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, the same on every rank."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises UsageError if the data set or its order is another one."""
        mine = self.state_dict()
        for key in ("size", "seed", "shuffle"):
            if state[key] != mine[key]:
                raise UsageError(
                    f"ResumableSampler: {key} was {state[key]!r} when the checkpoint was made and "
                    f"is {mine[key]!r} now, so samples would be repeated or lost",
                    hint=f"set {key} back to {state[key]!r}, or start a new run",
                )
        left = self.size - state["consumed"]
        if left < self.world_size:
            raise UsageError(
                f"ResumableSampler: {left} samples are left in epoch {state['epoch']}, not one for "
                f"each of {self.world_size} ranks",
                hint=f"resume with at most {left} ranks until the next epoch",
            )
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator)

    def _end(self, start: int) -> int:
        end = start + self.batch_size * self.world_size
        return self.size if self.size - end < self.world_size else end
