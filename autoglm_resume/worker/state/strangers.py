"""Optimizers that a script forgot to track, or put in the place of those that it tracks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoglm_resume.worker.state.within import modules_of

_HABIT = 8
"""Steps in a row, in none of which a tracked optimizer stepped: rivals take turns faster."""
_HABIT_ALONE = 3
"""Where none is tracked."""
_MOST = 20_000
"""Objects that are looked at for a way to an optimizer."""


class Strangers:
    """Those that step while no tracked one does; said once."""

    def __init__(self, objects: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._objects = objects
        self._say: Callable[[str], None] | None = say
        self._here: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those of the present step."""
        self._always: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those of each of the last `_steps`."""
        self._steps = 0

    def stepped(self, optimizer: Optimizer) -> None:
        """One that is not tracked did."""
        if self._say is not None:
            self._here.add(optimizer)

    def step_done(self, *, tracked: int, stepped: bool) -> None:
        """A step is complete, in which a tracked one has `stepped` or not."""
        here, self._here = self._here, weakref.WeakSet()
        if self._say is None or stepped or not here:
            self._steps = 0
            return
        self._always = here if not self._steps else self._always & here
        self._steps += 1
        if self._steps >= (_HABIT if tracked else _HABIT_ALONE) and self._always:
            self._judge(next(iter(self._always)))

    def _judge(self, optimizer: Optimizer) -> None:
        say, self._say = self._say, None
        modules = modules_of(self._objects).values()
        tracked = {id(parameter) for module in modules for parameter in module.parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        kind = type(optimizer).__name__
        if say is None or _reaches(self._objects.values(), optimizer):
            return
        if any(id(parameter) not in tracked for parameter in trained):
            say(
                f"{self._steps} steps in a row only an optimizer ({kind}) has stepped that is not"
                " tracked, nor are its parameters: what is being trained is in no checkpoint; give"
                " session.track() the model and the optimizer that the loop uses"
            )
        elif any(value is not None for s in optimizer.state.values() for value in s.values()):
            say(
                f"{self._steps} steps in a row only an optimizer ({kind}) has stepped that is not"
                " tracked: its state is in no checkpoint, and a resume would begin it anew; give it"
                " to session.track(), too"
            )


def _reaches(objects: Iterable[Any], optimizer: Optimizer) -> bool:
    """Whether the state of any of `objects` may be that of the optimizer as well: they hold it, or
    a function of theirs knows it by name.
    """
    own = [obj for obj in objects if not _is_plain(obj)]
    queue = [*own, *(getattr(obj.state_dict, "__func__", None) for obj in own)]
    seen = set(map(id, queue))
    while queue and len(seen) < _MOST:
        obj = queue.pop()
        if obj is optimizer:
            return True
        for inner in _referents(obj):
            if id(inner) not in seen:
                seen.add(id(inner))
                queue.append(inner)
    return bool(queue)  # nobody knows of so many


def _referents(obj: Any) -> Iterable[Any]:
    if isinstance(obj, FunctionType):
        known = [name for name in obj.__code__.co_names if name in obj.__globals__]
        return [*(obj.__globals__[name] for name in known), *(obj.__closure__ or ())]
    if isinstance(obj, type | ModuleType | torch.Tensor) or _is_plain(obj):
        return ()
    return gc.get_referents(obj)


def _is_plain(obj: Any) -> bool:
    """Whether all that it saves are its tensors, or settings."""
    usual = torch.nn.Module.state_dict
    return isinstance(obj, LRScheduler) or (
        isinstance(obj, torch.nn.Module) and getattr(obj.state_dict, "__func__", None) is usual
    )
