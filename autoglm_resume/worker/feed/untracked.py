"""Loaders of which nothing is tracked, and what a resume makes of them.

What they are for shows only when a step is done: which of them it took batches from, and how many.
So they are watched in the first steps of a process, and a word is said of each that trains.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, SequentialSampler

from autoglm_resume.worker.base import rng
from autoglm_resume.worker.feed import fetching
from autoglm_resume.worker.feed.sampler import ResumableSampler

WATCHED = 4
"""Steps."""


class Untracked:
    """Says of each loader, once, what a run that goes on at `step` cannot know of it."""

    def __init__(self, step: int, say: Callable[[str], None]) -> None:
        self._step = step
        self._say = say
        self._done = 0
        self._loaders: dict[tuple[int, int], _Loader] = {}
        self._holders: set[str] = set()
        fetching.hear_of(self._hear)

    def step_done(self) -> None:
        """A step is."""
        self._done += 1
        if self._done == 1:
            fetching.hear_of(None)  # what is iterated from here on is for evaluation, as a rule
        if self._done <= WATCHED:
            for key, loader in list(self._loaders.items()):
                if text := loader.wrong(self._step, self._done):
                    del self._loaders[key]
                    self._say(text)

    def _hear(self, iterator: Any) -> None:
        data = iterator._dataset
        if not hasattr(data, "state_dict") and (found := rng.held_by(data)):
            if found not in self._holders:
                self._say(
                    f"{found} is a generator of its own, which no checkpoint has: after a resume it"
                    " would repeat or skip draws; let the data set draw from the global generators"
                )
            self._holders.add(found)
        if not _is_tracked(iterator):
            self._loaders[id(iterator._index_sampler), id(data)] = _Loader(iterator)


class _Loader:
    """Its latest iteration."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = weakref.ref(iterator)
        self._use: fetching.Use = iterator._autoglm_use
        samplers = fetching.samplers_of(iterator)
        self._data = type(iterator._dataset).__name__
        self._resumable = any(isinstance(sampler, ResumableSampler) for sampler in samplers)
        self._persistent = bool(iterator._persistent_workers)
        self._own = "" if _in_sequence(samplers) else _generator_of(samplers)
        try:
            self._epoch = len(iterator)
        except TypeError:
            self._epoch = 0

    def wrong(self, step: int, done: int) -> str:
        """What is, if it trains; `done` is how many steps were since the run went on at `step`."""
        use = self._use
        whole = use.over and use.worked
        if not use.with_grad or not (whole or (self._iterator() is not None and not use.over)):
            return ""  # a look, or validation
        if self._resumable:
            return (
                "a loader's ResumableSampler is not tracked, so every resume would begin at its"
                " first batch: session.track(sampler=sampler)"
            )
        if not step:
            return ""
        what = f"the run goes on at step {step}, and"
        give = "give it an autoglm.ResumableSampler as batch_sampler=, and track that"
        if self._own:
            return (
                f"{what} a DataLoader of {self._data} has {self._own}, a generator of its own that"
                f" no checkpoint has: it deals the order of its first epoch again; {give}, or seed"
                " that generator for each epoch"
            )
        if self._persistent:
            return (
                f"{what} the persistent workers of a DataLoader of {self._data} begin anew, which"
                f" draws from the global generators once more; {give}, or leave"
                " persistent_workers out"
            )
        if whole or self._at_epoch(step, done):
            return ""
        return (
            f"{what} its data with the first batch of a DataLoader of which nothing is tracked;"
            f" {give}"
        )

    def _at_epoch(self, step: int, done: int) -> bool:
        """Whether the run goes on where an epoch begins, or that is not known yet."""
        if not self._epoch:
            return False
        taken = self._use.taken
        if done < WATCHED:  # they may have been taken ahead
            return any(step * each % self._epoch == 0 for each in (1, taken))
        if taken < done:  # by some steps only
            return step * taken % (self._epoch * done) == 0
        return step * (taken // done) % self._epoch == 0


def _is_tracked(iterator: Any) -> bool:
    known = [*fetching.samplers_of(iterator), iterator._dataset]
    return iterator._autoglm_noise is not None or any(getattr(k, "followed", False) for k in known)


def _in_sequence(samplers: list[Any]) -> bool:
    return all(isinstance(sampler, BatchSampler | SequentialSampler) for sampler in samplers)


def _generator_of(samplers: list[Any]) -> str:
    """Where a sampler has one of its own; empty if none has."""
    return next((found for sampler in samplers if (found := rng.held_by(sampler))), "")
