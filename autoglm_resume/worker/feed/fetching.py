"""What a batch draws at random while it is fetched follows from which batch it is.

A DataLoader's workers are seeded when they start, so after a restart they would repeat the noise of
the first batches. torch offers no hook between the indices of a batch and its fetching, so the
places where its loaders begin, draw indices and fetch are wrapped here, in this process and, as
this module is imported with the indices that they are sent, in workers however they were started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.base import rng

_begun: WeakSet[Any] = WeakSet()
_listener: Callable[[Any], None] | None = None


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


def _sampler_of(obj: Any) -> Any:
    names = ("_index_sampler", "batch_sampler", "sampler")
    return next((s for name in names if (s := getattr(obj, name, None)) is not None), None)


def _begin(self: Any, loader: DataLoader[Any]) -> None:
    self._autoglm_noise = _numbered.get(loader)
    if loader.num_workers and (problem := _refused(loader)):
        self._shutdown = True  # which __del__ would miss
        raise UsageError(problem)
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
    index, noise = _torch_next_index(self), self._autoglm_noise
    if noise is None or not isinstance(index, list) or self._dataset_kind != _DatasetKind.Map:
        return index
    return Dealt(index, f"{noise.seed} {getattr(self, '_sampler_iter_yielded', 0)} {index}")


def _fetch(self: Any, batch: Any) -> Any:
    if not isinstance(batch, Dealt):
        return _torch_fetch(self, batch)
    with rng.derived(batch.source):
        return _torch_fetch(self, batch)


_torch_begin: Callable[..., None] = _BaseDataLoaderIter.__init__
_torch_next_index: Callable[..., Any] = _BaseDataLoaderIter._next_index
_torch_fetch: Callable[..., Any] = _MapDatasetFetcher.fetch
_BaseDataLoaderIter.__init__ = _begin  # type: ignore[method-assign]
_BaseDataLoaderIter._next_index = _next_index  # type: ignore[method-assign]
_MapDatasetFetcher.fetch = _fetch  # type: ignore[method-assign]
