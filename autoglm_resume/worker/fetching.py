"""What a batch draws at random while it is fetched follows from which batch it is.

A DataLoader's workers are seeded when they start, so after a restart they would repeat the noise of
the first batches. torch offers no hook between the indices of a batch and its fetching, so the two
places where its loaders begin and fetch are wrapped here, in this process and, as this module is
imported with the indices it is sent, in workers however they were started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter

from autoglm_resume.worker import rng

_begun: WeakSet[DataLoader[Any]] = WeakSet()
_listener: Callable[[DataLoader[Any]], None] | None = None


class Dealt(list[int]):
    """The indices of a batch. What it draws at random comes from `source`."""

    def __init__(self, indices: Iterable[int], source: str) -> None:
        super().__init__(indices)
        self.source = source


def hear_of(listener: Callable[[DataLoader[Any]], None] | None) -> None:
    """Call `listener` with every loader that was iterated in this process, or will be."""
    global _listener
    _listener = listener
    if listener is not None:
        for loader in list(_begun):
            listener(loader)


def samplers_of(loader: Any) -> list[Any]:
    """The sampler of batches of a loader, and what it stands on."""
    found: list[Any] = []
    at = loader
    while (at := getattr(at, "batch_sampler", None) or getattr(at, "sampler", None)) is not None:
        if any(at is other for other in found):
            break
        found.append(at)
    return found


def _begin(self: Any, loader: DataLoader[Any]) -> None:
    _begun.add(loader)
    if _listener is not None:
        _listener(loader)
    if any(getattr(sampler, "deals_by_position", False) for sampler in samplers_of(loader)):
        # It draws a seed, which nothing needs, and after a resume it would do so once more.
        with rng.kept():
            _torch_begin(self, loader)
    else:
        _torch_begin(self, loader)


def _fetch(self: Any, batch: Any) -> Any:
    if not isinstance(batch, Dealt):
        return _torch_fetch(self, batch)
    with rng.derived(batch.source):
        return _torch_fetch(self, batch)


_torch_begin: Callable[..., None] = _BaseDataLoaderIter.__init__
_torch_fetch: Callable[..., Any] = _MapDatasetFetcher.fetch
_BaseDataLoaderIter.__init__ = _begin  # type: ignore[method-assign]
_MapDatasetFetcher.fetch = _fetch  # type: ignore[method-assign]
