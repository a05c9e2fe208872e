"""The modules and optimizers in what a script tracks: objects of its own hold some, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LRScheduler

Trained: TypeAlias = "torch.nn.Module | torch.optim.Optimizer"

_KNOWN = (torch.nn.Module, torch.optim.Optimizer)
_DEEPEST = 4
_MOST = 64
"""Members of a list or dict that are looked at: a log of a million losses holds no model."""
_ALL = 2048
"""Values that are looked at in one tracked object: this is done at every save."""


def within(objects: Mapping[str, Any]) -> dict[str, Trained]:
    """Those that are not tracked themselves, as `<object>.<attribute>`; each once."""
    seen = {id(unwrapped(obj)) for obj in objects.values()}
    found: dict[str, Trained] = {}
    for name, obj in objects.items():
        # A scheduler has its optimizer at hand, and saves nothing of it.
        if not isinstance(obj, (*_KNOWN, LRScheduler)):
            for place, inner in _members(name, obj, _DEEPEST, iter(range(_ALL))):
                if id(unwrapped(inner)) not in seen:
                    seen.add(id(unwrapped(inner)))
                    found[place] = inner
    return found


def modules_of(objects: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """All modules, tracked and within, without what wraps them."""
    inner = {name: unwrapped(obj) for name, obj in within(objects).items()}
    every = {**objects, **inner}
    return {name: obj for name, obj in every.items() if isinstance(obj, torch.nn.Module)}


def unwrapped(obj: Any) -> Any:
    """The module inside DistributedDataParallel and torch.compile: its names do not change."""
    while True:
        if isinstance(obj, torch.nn.parallel.DistributedDataParallel):
            obj = obj.module
        elif isinstance(obj, torch.nn.Module) and hasattr(obj, "_orig_mod"):
            obj = obj._orig_mod
        else:
            return obj


def _members(
    name: str, obj: Any, depth: int, budget: Iterator[int]
) -> Iterator[tuple[str, Trained]]:
    for (key, value), _ in zip(_parts(obj), budget, strict=False):
        place = f"{name}.{key}"
        if isinstance(value, _KNOWN):
            yield place, value
        elif depth and (isinstance(value, dict | list | tuple) or _is_stateful(value)):
            yield from _members(place, value, depth - 1, budget)


def _parts(obj: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(obj, dict):
        yield from islice(obj.items(), _MOST)
    elif isinstance(obj, list | tuple):
        yield from enumerate(islice(obj, _MOST))
    else:
        yield from getattr(obj, "__dict__", {}).items()


def _is_stateful(obj: Any) -> bool:
    return not isinstance(obj, type | LRScheduler) and hasattr(type(obj), "load_state_dict")
