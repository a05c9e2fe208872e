"""Gradients that wait for their optimizer's step when a save falls into an accumulation window.

As a rule a step has used them up by then, and saving them would cost a third of a checkpoint for
nothing. They are part of the state where a forward pass for training came after the last step, or
no step has come since the last one that was counted as done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

GRADIENTS = "_gradients"
"""The object that holds them in a checkpoint: of each module, by the names of its parameters."""


class PendingGradients:
    """Of the modules and optimizers among `objects`, which grow while a script tracks them."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self._used: set[int] = set()
        """Optimizers (by id) whose last step came after all forward passes."""
        self._done = 0
        """Steps that were counted as done."""
        self._stepped: dict[int, int] = {}
        """Of each optimizer, how many those were at its last step."""

    def forward(self) -> None:
        """A forward pass for training begins."""
        self._used.clear()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step ends."""
        self._used.add(id(optimizer))
        self._stepped[id(optimizer)] = self._done

    def step_done(self) -> None:
        """A step is complete."""
        self._done += 1

    def _pending(self, optimizer: torch.optim.Optimizer) -> bool:
        stepped = self._stepped.get(id(optimizer), -1)
        return id(optimizer) not in self._used or stepped < self._done - 1

    def state(self) -> dict[str, dict[str, Any]]:
        """What is pending now; empty as a rule."""
        optimizers = [o for o in self._objects.values() if isinstance(o, torch.optim.Optimizer)]
        waiting = {
            id(parameter)
            for optimizer in optimizers
            if self._pending(optimizer)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        if not waiting:
            return {}
        found = {
            name: {
                key: _packed(parameter.grad)
                for key, parameter in module.named_parameters()
                if id(parameter) in waiting and parameter.grad is not None
            }
            for name, module in self._objects.items()
            if isinstance(module, torch.nn.Module)
        }
        return {name: gradients for name, gradients in found.items() if gradients}


def put_back(gradients: Mapping[str, Mapping[str, Any]], objects: Mapping[str, Any]) -> None:
    """Let the parameters of `objects` have the gradients that were saved."""
    for name, saved in gradients.items():
        module = objects.get(name)
        if isinstance(module, torch.nn.Module):
            for key, parameter in module.named_parameters():
                if key in saved:
                    parameter.grad = _unpacked(saved[key]).to(parameter.device)


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
