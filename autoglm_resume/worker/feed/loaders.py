"""Loaders and other iterables that keep their position by themselves, and are tracked for it.

They count a batch when they hand it out. So a batch is to be taken in the step that trains on it,
and by the loader that is tracked; what says otherwise is refused, or said.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.base import rng
from autoglm_resume.worker.feed import fetching
from autoglm_resume.worker.feed.sampler import ResumableSampler


def deals_data(obj: Any) -> bool:
    """A sampler, a stateful loader such as torchdata's, or anything else to be iterated."""
    return isinstance(obj, ResumableSampler) or is_iterated(obj)


def is_iterated(obj: Any) -> bool:
    """Whether iterating `obj` is what it is for, and its state therefore a position."""
    return hasattr(type(obj), "__iter__") and not isinstance(
        obj, (ResumableSampler, torch.nn.Module, Mapping, Sequence)
    )


def is_loader(obj: Any) -> bool:
    """torchdata's StatefulDataLoader, its nodes' Loader, and whatever is derived from one."""
    return any("DataLoader" in c.__name__ or c.__name__ == "Loader" for c in type(obj).__mro__)


class Follower:
    """What a session knows of an iterable that it tracks as `name`.

    `find_place` is called when it is iterated, and restores its position if that has not happened
    yet. `say` tells a person. `where` is the rank and the steps completed, as text.
    """

    def __init__(
        self,
        name: str,
        obj: Any,
        find_place: Callable[[], None],
        where: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        """Raises UsageError for what could only be wrong."""
        _refuse(name, obj)
        self.name = name
        self._obj = obj
        self._find_place = find_place
        self._where = where
        self._say = say
        self._state: Any = None
        """What was restored, until a step is done."""
        self._generator: torch.Tensor | None = None
        """That of the loader, as it was restored."""
        self._told = False
        self._stepped = 0
        self._passes = 0
        self._dealt = 0
        self._dealt_before = 0
        """By the end of the first step."""
        self._latest: weakref.ref[Pass] | None = None
        self._looked_for_cycle = False
        self._handed_out = -1
        """By all loaders, up to the last step."""
        self._without = 0
        """Steps since then."""
        self.noise = fetching.Noise()
        if isinstance(obj, DataLoader):
            fetching.number(obj, self.noise)
        if isinstance(obj, Sampler):
            say(
                f"{name}: a {type(obj).__name__} counts what a loader draws from it, and a loader"
                " with workers draws ahead; use autoglm.ResumableSampler"
            )
        _let_tell(obj, self)

    def place(self) -> dict[str, Any]:
        """What there is to know of the present pass beside the object's own state.

        torchdata sets a loader's generator back to the beginning of the pass, and the order of the
        next epoch would follow from that.
        """
        found: dict[str, Any] = {}
        if self.noise.seed is not None:
            found["seed"] = self.noise.seed
        if isinstance(self._obj, DataLoader) and self._obj.generator is not None:
            found["generator"] = self._obj.generator.get_state()
        return found

    def restored(self, state: Any, place: Mapping[str, Any]) -> None:
        """The object was given `state`; `place` is what `place` said then."""
        if not is_loader(self._obj):
            return
        self._state = copy.deepcopy(state)
        self.noise.seed = place.get("seed")
        self._generator = place.get("generator")
        data = getattr(self._obj, "dataset", None)
        if isinstance(data, IterableDataset):
            if _without_state(state):
                raise UsageError(
                    f"{self.name}: {type(data).__name__} has no state, and torchdata skips too much"
                    " of such data at a second resume",
                    hint="give the data set state_dict() and load_state_dict()",
                )
            if self._obj.num_workers:
                self._say(
                    f"{self.name}: what workers of an IterableDataset draw at random goes on from"
                    " other numbers, unless the data set's state_dict() has its generators"
                )

    def begin(self, iterate: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """A pass over the object; `iterate` is its own `__iter__`."""
        self._find_place()
        self._passes += 1
        if not is_loader(self._obj):
            return iterate()
        if self._state is not None and self._passes > 1:
            # What was taken from an earlier pass was not trained on: it was a look.
            self._obj.load_state_dict(copy.deepcopy(self._state))
        if not self._stepped:
            self._dealt = 0
        found = Pass(self, lambda anew: self._iterate(iterate, anew), self._state is None)
        self._latest = weakref.ref(found)
        return found

    def training(self) -> None:
        """It begins. Raises UsageError if a batch was taken that is to be trained on later."""
        at = self._latest() if self._latest is not None else None
        if at is not None and at.dealt and not self._stepped:
            raise UsageError(
                f"{self.name}: a batch was taken before session.steps() began, and"
                f" {type(self._obj).__name__} counts it as trained on before it is",
                hint="in zip() put session.steps(n) first; else drop the iterator that the batch"
                " is from, and begin another one",
            )

    def step_done(self) -> None:
        """A step is complete. Raises UsageError if batches are taken ahead of their steps."""
        self._state = None
        self._stepped += 1
        if self._stepped == 1:
            self._dealt_before = self._dealt
            if not self._passes and is_loader(self._obj):
                self._say(
                    f"{self.name} is tracked, and the first step took nothing from it: if another"
                    " loader deals the data, track that one, or a resume will not find its place"
                )
        elif self._stepped == 2 and self._passes == 1:
            first, second = self._dealt_before, self._dealt - self._dealt_before
            if first > second > 0:
                raise UsageError(
                    f"{self.name}: the first step took {first} batches, the second one {second}:"
                    f" {type(self._obj).__name__} counts what is taken ahead as trained on",
                    hint="take a batch in the step that trains on it, or use a ResumableSampler",
                )

        self._hear_of_repeats()

    def _hear_of_repeats(self) -> None:
        """Say once that steps train on nothing that any loader deals, after a pass is over."""
        at = self._latest() if self._latest is not None else None
        over = self._passes > 0 and is_loader(self._obj) and (at is None or at.over)
        same = self._handed_out == fetching.Work.handed_out
        self._handed_out = fetching.Work.handed_out
        self._without = self._without + 1 if over and same else 0
        if self._without == 2:
            self._say(
                f"{self.name}: steps go on, and no loader deals anything: if they repeat batches"
                " that were kept, a resume would deal others; begin the loader anew for each epoch"
            )

    def took(self) -> None:
        """A batch was handed out."""
        self._dealt += 1
        fetching.Work.handed_out += 1

    def ended(self, found: Pass) -> None:
        """`found` is over. Raises UsageError where `itertools.cycle` would repeat its batches."""
        found.over = True
        if not self._looked_for_cycle:
            self._looked_for_cycle = True
            if fetching.in_cycle(found):
                raise UsageError(
                    f"{self.name}: itertools.cycle() repeats the batches of the first epoch, and a"
                    " resume would deal others",
                    hint="begin the loader anew for each epoch, as in"
                    " `while True: yield from loader`",
                )

    def was_over(self) -> bool:
        """A pass ended before it dealt anything. Whether it only ended a restored epoch."""
        if self._state is not None and not self._told:
            self._told = True
            self._say(f"{self.name} was saved at the end of an epoch: it begins the next one")
        return self._state is not None

    def _iterate(self, iterate: Callable[[], Iterator[Any]], anew: bool) -> Iterator[Any]:
        """Begin a pass, `anew` or where it was restored.

        A loader without a generator of its own would draw a seed from the global one, and after a
        resume once more; what is skipped then must not be drawn from it either.
        """
        if anew or self.noise.seed is None:
            text = f"{torch.initial_seed()} {self.name} {self._where()}"
            self.noise.seed = rng.seed_from(text)
        lacks = isinstance(self._obj, DataLoader) and self._obj.generator is None
        if lacks:
            self._obj.generator = torch.Generator().manual_seed(self.noise.seed)
        try:
            with nullcontext() if anew else rng.kept():
                return iterate()
        finally:
            if lacks:
                self._obj.generator = None
            elif self._generator is not None and not anew:
                self._obj.generator.set_state(self._generator)


class Pass(Iterator[Any]):
    """One iteration over a followed loader."""

    def __init__(
        self, follower: Follower, begin: Callable[[bool], Iterator[Any]], anew: bool
    ) -> None:
        self._follower = follower
        self._begin = begin
        self._batches = begin(anew)
        self.dealt = 0
        self.over = False

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            if self.dealt or not self._follower.was_over():
                self._follower.ended(self)
                raise
            self._batches = self._begin(True)
            batch = next(self._batches)
        self.dealt += 1
        self._follower.took()
        return batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batches"], name)


def _let_tell(obj: Any, follower: Follower) -> None:
    """Let `obj` tell `follower` when it is iterated."""
    known = type(obj)

    def begin(self: Any) -> Iterator[Any]:
        if self is not obj or get_worker_info() is not None:  # a copy
            return known.__iter__(self)  # type: ignore[no-any-return]
        return follower.begin(lambda: known.__iter__(self))

    names = {"__module__": known.__module__, "__qualname__": known.__qualname__, "followed": True}
    try:
        obj.__class__ = type(known.__name__, (known,), {"__iter__": begin, **names})
    except TypeError:
        return  # not a class of Python's


def _refuse(name: str, obj: Any) -> None:
    samplers = fetching.samplers_of(obj)
    if any(isinstance(sampler, ResumableSampler) for sampler in samplers):
        raise UsageError(
            f"session.track({name}=…): this loader and the ResumableSampler in it would each keep a"
            " position of their own",
            hint="track the sampler, and use it with a plain torch.utils.data.DataLoader",
        )
    data = getattr(obj, "dataset", None)
    if (
        is_loader(obj)
        and isinstance(data, IterableDataset)
        and not hasattr(data, "state_dict")
        and inspect.isgeneratorfunction(type(data).__iter__)
    ):
        raise UsageError(
            f"session.track({name}=…): {type(data).__name__} has no state, and torchdata skips too"
            " much of such data at a second resume",
            hint="give the data set state_dict() and load_state_dict()",
        )


def _without_state(state: Any) -> bool:
    """Whether in a state of torchdata's there is none of the data set, nor of its iterator."""
    if not isinstance(state, Mapping):
        return False
    if "_snapshot" in state:
        workers = state["_snapshot"].get("_worker_snapshots", {}).values()
        return any(map(_without_state, workers))
    fetcher = state.get("fetcher_state") or state.get("_fetcher_state") or {}
    found = state.get("dataset_state", state.get("_dataset_state"))
    return bool(fetcher) and found is None and fetcher.get("dataset_iter_state") is None
