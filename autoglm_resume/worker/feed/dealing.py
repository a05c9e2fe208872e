"""One iteration over a ResumableSampler: which batches of it the training process was given.

A loader with workers draws ahead, so what is drawn says little. What is handed out, what was
trained on meanwhile and how many steps were done say where training is, and whether steps take what
the sampler counts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.feed import fetching

if TYPE_CHECKING:
    from autoglm_resume.worker.feed.sampler import ResumableSampler

SAME_STEPS = 4
"""Steps that must take equally many batches before that is taken for a step's need."""


class EpochOver(UsageError, StopIteration):
    """The end of an iteration, which loops expect; to whoever does not, it says what to do."""


class Dealing(Iterator[list[int]]):
    """One iteration. Where it begins is known when its first batch is drawn, and not before."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self._batches: Iterator[list[int]] | None = None
        self.placed = 0
        self.epoch = 0
        self.within = False
        """Whether it begins within that epoch."""
        self.by_loader = False
        """A DataLoader draws from it, which says itself what it hands out."""
        self._iterator: weakref.ref[Any] | None = None
        """That of the DataLoader."""
        self.use = fetching.Use()
        self.steps = 0
        self.before_steps = False
        """It was over before a step was done in it."""
        self.carried = 0
        """Batches of the iteration before that were handed out, and not counted when it began."""
        self.drawn_by: threading.Thread | None = None
        self._counted = 0
        self._taken_before = 0
        self._leads: set[int] = set()

    def __next__(self) -> list[int]:
        sampler = self._sampler
        if self._batches is None:
            self.drawn_by = threading.current_thread()
            self._batches = sampler.begin(self)
        elif self.placed != sampler.placed:
            raise UsageError(
                "ResumableSampler: batches were drawn before session.track(), or before a position"
                " was loaded, and the loader would go on with them",
                hint="begin the loader, as in `batches = iter(loader)`, after session.track()",
            )
        try:
            batch = next(self._batches)
        except StopIteration:
            if self.by_loader or sampler.wrapped:
                raise
            raise self.ended(self) from None
        if not self.by_loader:
            self.hand_out()
        return batch

    def hand_out(self, iterator: Any = None) -> None:
        """The training process was given a batch, by `iterator` if a loader has one."""
        if iterator is not None and self._iterator is None:
            self._iterator = weakref.ref(iterator)
        self.use.hand_out()
        self._sampler.handed_out(self)

    def ended(self, iterator: object) -> StopIteration:
        """The training process has found `iterator` at its end; returns what it is to be told.

        Raises UsageError where `itertools.cycle` would repeat this iteration for ever.
        """
        sampler = self._sampler
        if not sampler.followed:
            found = StopIteration()
        else:
            sampler.refuse_cycle(iterator)
            found = EpochOver(
                f"epoch {self.epoch} is over: an iteration over a loader of a ResumableSampler"
                " deals one epoch; with endless=True it goes on with the next one"
            )
        if not self.use.over:
            self.use.over = True
            sampler.ended(self)
        return found

    @property
    def goes_on(self) -> bool:
        """Whether a loader's iterator is still there to deal more of it."""
        iterator = self._iterator() if self._iterator is not None else None
        return not self.use.over and getattr(iterator, "_sampler_iter", None) is self

    @property
    def lead(self) -> int:
        """Batches handed out beyond those that steps counted."""
        return self.carried + self.use.taken - self._counted

    @property
    def held(self) -> int:
        """The least lead after a step before the end: what a prefetcher holds is never less."""
        return min(self._leads, default=0)

    @property
    def steadily_held(self) -> bool:
        """Whether steps always found a prefetcher's same batches in its hands."""
        return len(self._leads) == 1 and self.held > 0

    def step_done(self, counted: int) -> int:
        """A step on it is done, for which so many are `counted`; returns how many it took."""
        self.steps += 1
        self._counted += counted
        if not self.use.over:
            self._leads.add(self.lead)
        taken, self._taken_before = self.use.taken - self._taken_before, self.use.taken
        return taken


class Pace:
    """Whether steps take as many batches as are counted."""

    def __init__(self) -> None:
        self.told = False
        self._taken: list[int] = []
        """By the latest steps, but for the first one, in which a prefetcher fills."""
        self._steps = 0
        self._total = 0
        self._most: int | None = None
        """The lead after the first step, which it may keep."""

    def step_done(
        self, dealing: Dealing, taken: int, counted: int, *, usual: int, ahead: bool
    ) -> str:
        """A step took `taken` batches where `counted` are counted, of `usual` ones; returns what to
        say, once.

        `ahead` says that another thread takes them, however many at a time.
        """
        self._steps += 1
        self._total += taken
        if self._most is None:
            if not dealing.use.over:  # or there was nothing left to be held
                self._most = max(0, dealing.lead)
            return ""
        self._taken = [*self._taken, taken][-SAME_STEPS:]
        same = len(set(self._taken)) == 1
        if self.told or not taken or (same and len(self._taken) < SAME_STEPS):
            return ""
        if same and taken != counted:
            self.told = True
            return (
                f"each step takes {taken} batches, and the ResumableSampler counts"
                f" {usual}: a resume would repeat or skip some;"
                f" set batches_per_step={taken}"
            )
        if not same and not ahead and (dealing.lead > self._most or dealing.lead < 0):
            self.told = True
            return (
                f"{self._steps} steps took {self._total} batches, and the ResumableSampler counts"
                f" {usual} for each step: a resume would repeat or skip some; let every batch be"
                " a step (session.step_done() also for one that is left out)"
            )
        return ""
