"""What a batch draws at random while it is fetched follows from which batch it is.

A DataLoader's workers are seeded when they start, so after a restart they would repeat the noise of
the first batches. torch offers no hook between the indices of a batch and its fetching, so the
places where its loaders begin, draw indices and fetch are wrapped here, in this process and, as
this module is imported with the indices that they are sent, in workers however they were started.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.base import rng

_begun: WeakSet[Any] = WeakSet()
_listener: Callable[[Any], None] | None = None


class Work:
    """How often this process computed something for training or stepped an optimizer, and how many
    batches its loaders handed out."""

    done = 0
    handed_out = 0

    @classmethod
    def more(cls, *_: Any) -> None:
        """It did."""
        if not torch.compiler.is_compiling():
            cls.done += 1


class Use:
    """What the training process was given of a pass, and whether it trained meanwhile."""

    def __init__(self) -> None:
        self.taken = 0
        self.over = False
        """It has asked for more than there is."""
        self.worked = False
        """It trained on some before it took the last one: no mere look, and no list of batches."""
        self.with_grad = False
        self.thread: threading.Thread | None = None
        """The one that took the latest."""
        self._work_before = 0

    def hand_out(self) -> None:
        """One more batch."""
        if not self.taken:
            self._work_before = Work.done
        self.taken += 1
        self.worked = Work.done > self._work_before
        self.with_grad |= torch.is_grad_enabled()
        self.thread = threading.current_thread()
        Work.handed_out += 1


class Noise:
    """What the batches of a pass draw at random comes from `seed` and their number."""

    seed: int | None = None


_numbered: WeakKeyDictionary[DataLoader[Any], Noise] = WeakKeyDictionary()


class Dealt(list[int]):
    """The indices of a batch. What it draws at random comes from `source`."""

    def __init__(self, indices: Iterable[int], source: str) -> None:
        super().__init__(indices)
        self.source = source


def number(loader: DataLoader[Any], noise: Noise) -> None:
    """Let the batches of `loader`, which counts and restores their number, draw from `noise`.

    Only of a data set that is asked by index: a stream may be skipped in other steps than before.
    """
    _numbered[loader] = noise


def hear_of(listener: Callable[[Any], None] | None) -> None:
    """Call `listener` with every iterator of a DataLoader that there is, or will be."""
    global _listener
    _listener = listener
    for iterator in list(_begun):
        if _listener is not None:
            _listener(iterator)


def samplers_of(loader: Any) -> list[Any]:
    """The sampler of batches of a loader or its iterator, and what it stands on."""
    found: list[Any] = []
    at = _sampler_of(loader)
    while at is not None and all(at is not other for other in found):
        found.append(at)
        at = _sampler_of(at)
    return found


def in_cycle(iterator: Any) -> bool:
    """Whether `itertools.cycle` holds `iterator`, and will repeat what it dealt for ever."""
    return any(isinstance(found, itertools.cycle) for found in gc.get_referrers(iterator))


def _sampler_of(obj: Any) -> Any:
    names = ("_index_sampler", "batch_sampler", "sampler")
    return next((s for name in names if (s := getattr(obj, name, None)) is not None), None)


def _begin(self: Any, loader: DataLoader[Any]) -> None:
    self._autoglm_noise = _numbered.get(loader)
    self._autoglm_use = Use()
    if loader.num_workers and (problem := _refused(loader)):
        self._shutdown = True  # which __del__ would miss
        raise UsageError(problem)
    for below in samplers_of(loader)[1:]:
        if getattr(below, "deals_by_position", False):
            below.wrapped = True
    positioned = any(getattr(each, "deals_by_position", False) for each in samplers_of(loader))
    if positioned or getattr(loader.dataset, "followed", False):
        # It draws a seed, which nothing needs, and after a resume it would do so once more.
        with rng.kept():
            _torch_begin(self, loader)
    else:
        _torch_begin(self, loader)
    _begun.add(self)
    if _listener is not None:
        _listener(self)


def _refused(loader: DataLoader[Any]) -> str:
    """What of tracked data the workers of `loader` would make wrong; empty if nothing."""
    followed = [s for s in samplers_of(loader) if getattr(s, "followed", False)]
    if followed and not getattr(loader, "in_order", True):
        return (
            "DataLoader(in_order=False) hands batches out in an order of its own, so which were"
            " trained on cannot be known from how many were; leave it out"
        )
    if getattr(loader.dataset, "followed", False) and loader not in _numbered:
        loads, data = type(loader).__name__, type(loader.dataset).__name__
        return (
            f"the workers of a {loads} have copies of its {data}, and the one that is"
            " tracked stays where it is; use num_workers=0, or track a torchdata StatefulDataLoader"
        )
    return ""


def _next_index(self: Any) -> Any:
    if hasattr(self._sampler_iter, "by_loader"):
        self._sampler_iter.by_loader = True
    index, noise = _torch_next_index(self), self._autoglm_noise
    if noise is None or not isinstance(index, list) or self._dataset_kind != _DatasetKind.Map:
        return index
    return Dealt(index, f"{noise.seed} {getattr(self, '_sampler_iter_yielded', 0)} {index}")


def _next(self: Any) -> Any:
    if self._autoglm_use.over:
        self._autoglm_use = Use()  # persistent workers begin another pass
    try:
        batch = _torch_next(self)
    except StopIteration:
        self._autoglm_use.over = True
        if hasattr(self._sampler_iter, "by_loader"):
            raise self._sampler_iter.ended(self) from None
        raise
    self._autoglm_use.hand_out()
    if hasattr(self._sampler_iter, "by_loader"):
        self._sampler_iter.hand_out(self)
    return batch


def _fetch(self: Any, batch: Any) -> Any:
    if not isinstance(batch, Dealt):
        return _torch_fetch(self, batch)
    with rng.derived(batch.source):
        return _torch_fetch(self, batch)


_torch_begin: Callable[..., None] = _BaseDataLoaderIter.__init__
_torch_next_index: Callable[..., Any] = _BaseDataLoaderIter._next_index
_torch_next: Callable[..., Any] = _BaseDataLoaderIter.__next__
_torch_fetch: Callable[..., Any] = _MapDatasetFetcher.fetch
_BaseDataLoaderIter.__init__ = _begin  # type: ignore[method-assign]
_BaseDataLoaderIter._next_index = _next_index  # type: ignore[method-assign]
_BaseDataLoaderIter.__next__ = _next  # type: ignore[method-assign]
_MapDatasetFetcher.fetch = _fetch  # type: ignore[method-assign]
register_optimizer_step_post_hook(Work.more)
