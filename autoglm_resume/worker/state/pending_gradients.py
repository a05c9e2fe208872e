"""Gradients that are part of the state: those that are not used up when a save comes.

As a rule an optimizer's step has used them up by then, and saving them would cost a third of a
checkpoint for nothing: they are cleared before the next backward pass, or are cleared already. They
are state where

- a forward or backward pass for training came after the last step, or none has come since the last
  one that was counted as done: an accumulation window;
- somebody changed them after the step: zeros are not None to an optimizer with moments;
- the loop does not clear them, as the backward pass after the last step but one has shown;
- no optimizer is known to step their parameters: the script has an update of its own.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autoglm_resume.worker.state.within import modules_of

GRADIENTS = "_gradients"
"""The object that holds them in a checkpoint: of each module, by the names of its parameters."""

_GRADIENT: Callable[[torch.Tensor], torch.Tensor | None] = operator.attrgetter("grad")


class PendingGradients:
    """Of the modules and optimizers among and within `objects`, which grow while a script tracks
    them, and of every other optimizer that steps.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self.passes = 0
        """Forward and backward passes for training that were seen."""
        self._done = 0
        """Steps that were counted as done."""
        self._uses: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Use] = (
            weakref.WeakKeyDictionary()
        )
        self._parameters: list[tuple[str, str, torch.nn.Parameter]] | None = None
        self._restored: list[weakref.ref[torch.Tensor]] = []

    def forward(self) -> None:
        """A forward pass for training begins."""
        self.passes += 1

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step ends."""
        use = self._uses.get(optimizer)
        if use is None:
            self._uses[optimizer] = use = _Use(self._backward)
            before = {id(each()) for each in self._restored} - {id(None)}
            use.kept = any(id(p.grad) in before for p in _parameters(optimizer))
        use.note(_parameters(optimizer), self.passes, self._done)

    def step_done(self) -> None:
        """A step is complete."""
        self._done += 1
        for use in self._uses.values():
            use.watch()

    def changed(self) -> None:
        """The modules may have other parameters now."""
        self._parameters = None

    def state(self) -> dict[str, dict[str, Any]]:
        """What is pending now; empty as a rule."""
        if self._parameters is None:
            self._parameters = [
                (name, key, parameter)
                for name, module in modules_of(self._objects).items()
                for key, parameter in module.named_parameters()
            ]
        there = {id(p) for _, _, p in self._parameters if p.grad is not None}
        waiting = self._waiting(there) if there else set()
        found: dict[str, dict[str, Any]] = {}
        if waiting:
            for name, key, parameter in self._parameters:
                if id(parameter) in waiting and parameter.grad is not None:
                    found.setdefault(name, {})[key] = _packed(parameter.grad)
        return found

    def put_back(self, gradients: Mapping[str, Mapping[str, Any]]) -> None:
        """Let the parameters have the gradients that were saved."""
        modules = modules_of(self._objects) if gradients else {}
        for name, saved in gradients.items():
            for key, parameter in modules[name].named_parameters() if name in modules else ():
                if key in saved:
                    parameter.grad = _unpacked(saved[key]).to(parameter.device)
                    self._restored.append(weakref.ref(parameter.grad))

    def _backward(self) -> None:
        self.passes += 1

    def _waiting(self, there: set[int]) -> set[int]:
        """Of the parameters that have gradients, by `id`, those whose gradients are state."""
        waiting, owned = set(), set()
        for optimizer, use in self._uses.items():
            parameters = _parameters(optimizer)
            ids = set(map(id, parameters))
            if use.kept or use.passes != self.passes or use.step < self._done - 1:
                waiting |= ids
            else:
                waiting |= use.changed(parameters)
            owned |= ids
        return (waiting | (there - owned)) & there


@dataclass
class _Use:
    """What an optimizer's last step has used, and what became of it since."""

    tell: Callable[[], None]
    """That a backward pass came."""
    passes: int = 0
    step: int = 0
    kept: bool = False
    """Whether the backward pass after the step before found the gradients as that had left them."""
    _gradients: list[int] = field(default_factory=list)
    """By `id`: to hold them would keep their memory from who clears them."""
    _versions: list[int] = field(default_factory=list)
    _probe: _Probe | None = None
    _next: weakref.ref[torch.nn.Parameter] | None = None

    def note(self, parameters: list[torch.nn.Parameter], passes: int, step: int) -> None:
        """A step has used the gradients of these."""
        self.passes, self.step = passes, step
        self._gradients, self._versions = _look(parameters)
        if self._probe is None or not self._probe.used():
            trained = (p for p in parameters if p.grad is not None and p.requires_grad)
            self._next = next(map(weakref.ref, trained), None)

    def watch(self) -> None:
        """Have a parameter tell of the next backward pass; not while one may be under way."""
        if self._next is not None and (parameter := self._next()) is not None:
            if self._probe is not None:
                self._probe.remove()
            self._probe = _Probe(parameter, weakref.ref(self))
            self._probe.used()
        self._next = None

    def accumulated(self, kept: bool | None) -> None:
        """A gradient was added to that of the probe; `kept` says whether what was there stayed,
        None if that is known already.
        """
        if kept is not None:
            self.kept = kept
        self.tell()

    def changed(self, parameters: list[torch.nn.Parameter]) -> set[int]:
        """Whose gradients are not what the step has left."""
        gradients, versions = _look(parameters)
        if gradients == self._gradients and versions == self._versions:
            return set()
        if len(gradients) != len(self._gradients):
            return set(map(id, parameters))
        if len(versions) != len(self._versions) or not versions:
            versions, self._versions = [0] * len(gradients), [0] * len(gradients)
        both = zip(gradients, versions, self._gradients, self._versions, strict=True)
        return {
            id(parameter)
            for parameter, (gradient, version, before, old) in zip(parameters, both, strict=True)
            if (gradient, version) != (before, old)
        }


class _Probe:
    """A hook on one parameter of an optimizer, that hears of backward passes."""

    def __init__(self, parameter: torch.nn.Parameter, use: weakref.ref[_Use]) -> None:
        self._parameter = weakref.ref(parameter)
        self._use = use
        self._left: weakref.ref[torch.Tensor] | None = None
        """The gradient that the last step has used, and its version then."""
        self._version = 0
        self._told = False
        hear = parameter.register_post_accumulate_grad_hook
        self._handle = hear(self)  # type: ignore[no-untyped-call]

    def used(self) -> bool:
        """A step has used the gradient; returns whether there is one to hear of."""
        parameter = self._parameter()
        if parameter is None or parameter.grad is None:
            return False
        self._left, self._version = weakref.ref(parameter.grad), _version(parameter.grad)
        self._told = False
        return True

    def __call__(self, parameter: torch.Tensor) -> None:
        gradient, use = parameter.grad, self._use()
        if gradient is None or use is None or torch.compiler.is_compiling():
            return
        left = self._left is not None and gradient is self._left()
        if left and _version(gradient) == self._version:
            return  # the step was made by another hook of this very pass
        # Those of a bucket count their changes together: nobody knows whether this one was zeroed.
        stayed = left and (gradient._is_view() or _version(gradient) == self._version + 1)
        use.accumulated(None if self._told else stayed)
        self._told = True

    def remove(self) -> None:
        """Hear nothing more."""
        self._handle.remove()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _look(parameters: list[torch.nn.Parameter]) -> tuple[list[int], list[int]]:
    """The gradients by `id`, and how often each was changed in place."""
    gradients = list(map(_GRADIENT, parameters))
    try:
        versions = [0 if gradient is None else gradient._version for gradient in gradients]
    except RuntimeError:  # nobody counts changes of tensors that are made in inference mode
        versions = []
    return list(map(id, gradients)), versions


def _version(gradient: torch.Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version


def _packed(gradient: torch.Tensor) -> Any:
    """As what can be saved: a sparse one as its entries."""
    if gradient.layout is not torch.sparse_coo:
        return gradient
    found = gradient.coalesce()
    return {"indices": found.indices(), "values": found.values(), "size": found.size()}


def _unpacked(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    return torch.sparse_coo_tensor(
        packed["indices"],
        packed["values"],
        packed["size"],
        is_coalesced=True,
        check_invariants=True,
    )
