"""Beats from inside a step, so that the phase in which a rank died is known."""

from __future__ import annotations

from typing import Any

import torch

from autoglm_resume.worker.board import Phase, Pulse


def watch(obj: Any, pulse: Pulse) -> None:
    """Let `obj`, a module or an optimizer as the training loop calls it, beat at its phases.

    Compiled modules are left alone: a hook would change what was compiled.
    """
    if isinstance(obj, torch.nn.Module):
        if not hasattr(obj, "_orig_mod"):
            _watch_module(obj, pulse)
    elif isinstance(obj, torch.optim.Optimizer):
        _watch_optimizer(obj, pulse)


def _watch_module(module: torch.nn.Module, pulse: Pulse) -> None:
    def before(called: torch.nn.Module, args: Any) -> None:
        if called.training:
            pulse.phase(Phase.FORWARD)

    def after(called: torch.nn.Module, args: Any, output: Any) -> None:
        if called.training and torch.is_grad_enabled():
            pulse.phase(Phase.BACKWARD)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _watch_optimizer(optimizer: torch.optim.Optimizer, pulse: Pulse) -> None:
    def before(called: Any, args: Any, kwargs: Any) -> None:
        pulse.phase(Phase.OPTIMIZER)

    optimizer.register_step_pre_hook(before)
