"""Beats from inside a step, so that the phase in which a rank died is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autoglm_resume.protocol.heartbeats import Phase, Pulse
from autoglm_resume.worker.feed.fetching import Work


def watch(obj: Any, pulse: Pulse, on_forward: Callable[[], None]) -> None:
    """Let `obj`, a module or an optimizer as the training loop calls it, beat at its phases.

    `on_forward` is called when a module is about to compute something for training. What is being
    compiled is left alone: a hook in there would break the graph.
    """
    if isinstance(obj, torch.nn.Module):
        obj.register_forward_pre_hook(_Training(on_forward))
        if not hasattr(obj, "_orig_mod"):
            obj.register_forward_pre_hook(_Beat(pulse, Phase.FORWARD))
            obj.register_forward_hook(_Beat(pulse, Phase.BACKWARD, with_grad=True))
    elif isinstance(obj, torch.optim.Optimizer):
        obj.register_step_pre_hook(_Beat(pulse, Phase.OPTIMIZER))
        # What follows in a step may take any time: evaluation, samples, a log on a slow disk.
        obj.register_step_post_hook(_Beat(pulse, Phase.STEPPED))


class _Beat:
    """A hook. A copy of the model, deep or pickled, gets one that does nothing."""

    def __init__(self, pulse: Pulse, phase: Phase, *, with_grad: bool = False) -> None:
        self._pulse = pulse
        self._phase = phase
        self._with_grad = with_grad

    def __call__(self, called: Any, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        # An optimizer has no `training`.
        if not getattr(called, "training", True):
            self._pulse.phase(Phase.EVALUATE)
        elif not self._with_grad or torch.is_grad_enabled():
            self._pulse.phase(self._phase)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Silence, ())


class _Training:
    """A hook that tells of a forward pass for training. A copy of the model gets none."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, module: torch.nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            Work.more()
            self._tell()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Silence, ())


class _Silence:
    def __call__(self, *_: Any) -> None:
        """Nothing."""
