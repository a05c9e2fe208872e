"""A sampler that deals every sample once per epoch, however often training is interrupted."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed.fetching import Dealt

SAME_STEPS = 4
"""Steps that must draw equally many batches before that is taken for a step's need."""


class ResumableSampler:
    """A batch sampler for `torch.utils.data.DataLoader(..., batch_sampler=sampler)`.

    Each global batch (`batch_size` times world size samples of the epoch's permutation) is dealt to
    the ranks in turn; the last one of an epoch may be smaller, and what would not give every rank
    a sample joins the batch before it. So nothing is padded, dropped, or seen twice.

    The position moves when a step is *done* (`Session.step_done` moves every tracked sampler, so
    track the one of training only), not when an index is drawn: a DataLoader draws ahead, and a
    checkpoint must count only what was trained on. The position is a number of global samples;
    after the last step of an epoch it is the beginning of the next one.

    What a DataLoader's data set and `collate_fn` draw from the global generators of Python, NumPy
    and torch (on the CPU) follows from `seed` and the position alone, with and without workers.
    """

    deals_by_position = True

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
        self._find_place: Callable[[], None] | None = None
        self._placed = 0
        """How often the position was set, rather than moved."""
        self._say: Callable[[str], None] = print
        self._latest: weakref.ref[_Dealing] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        dealing = _Dealing(self)
        self._latest = weakref.ref(dealing)
        return dealing

    def follow(self, find_place: Callable[[], None], say: Callable[[str], None]) -> None:
        """Call `find_place` before the first batch of an iteration, to be where a session is.

        From now on only the session moves the position. `say` tells a person.
        """
        self._find_place = find_place
        self._say = say
        self._placed += 1

    @property
    def followed(self) -> bool:
        """Whether a session tracks it."""
        return self._find_place is not None

    def advance(self) -> None:
        """Count one step's batches as consumed. Raises UsageError if a session does it."""
        if self.followed:
            raise UsageError(
                "ResumableSampler: advance() was called by hand, and session.step_done() does it",
                hint="leave it out; the steps of session.steps() are counted too",
            )
        self.step_done()

    def step_done(self) -> None:
        """For sessions: `advance`. Says once if a step takes more or fewer batches than counted."""
        dealing = self._latest() if self._latest is not None else None
        taken = dealing.step_done() if dealing is not None else 0
        if taken not in (0, self.batches_per_step):
            self._say(
                f"each step takes {taken} batches, and the ResumableSampler counts"
                f" {self.batches_per_step}: a resume would repeat or skip some;"
                f" set batches_per_step={taken}"
            )
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
        self._placed += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy is nobody's."""
        return {**self.__dict__, "_find_place": None, "_say": print, "_latest": None}

    def _deal(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.consumed
        while True:
            order = self._order(epoch)
            while start < self.size:
                end = self._end(start)
                mine = order[start + self.rank : end : self.world_size].tolist()
                yield Dealt(mine, f"{self.seed} {epoch} {start} {self.rank}")
                start = end
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator)

    def _end(self, start: int) -> int:
        end = start + self.batch_size * self.world_size
        return self.size if self.size - end < self.world_size else end


class _Dealing(Iterator[list[int]]):
    """One iteration. Where it begins is known when its first batch is drawn, and not before."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self._placed = 0
        self._batches: Iterator[list[int]] | None = None
        self._drawn = 0
        self._by_step: list[int] = []

    def __next__(self) -> list[int]:
        sampler = self._sampler
        if self._batches is None:
            if sampler._find_place is not None:
                sampler._find_place()
            self._placed = sampler._placed
            self._batches = sampler._deal()
        elif self._placed != sampler._placed:
            raise UsageError(
                "ResumableSampler: batches were drawn before session.track(), or before a position"
                " was loaded, and the loader would go on with them",
                hint="begin the loader, as in `batches = iter(loader)`, after session.track()",
            )
        batch = next(self._batches)
        self._drawn += 1
        return batch

    def step_done(self) -> int:
        """The number of batches that every one of the first steps drew; 0 if it is not known.

        The first one is not looked at, in which a loader draws ahead.
        """
        if len(self._by_step) > SAME_STEPS:
            return 0
        self._by_step.append(self._drawn)
        taken = {b - a for a, b in zip(self._by_step, self._by_step[1:], strict=False)}
        return taken.pop() if len(taken) == 1 and len(self._by_step) > SAME_STEPS else 0
