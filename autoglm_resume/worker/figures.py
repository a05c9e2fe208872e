"""What a script reports of its steps: shown in the heartbeat, guarded, and saved with the state."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from autoglm_resume.errors import UsageError
from autoglm_resume.protocol.heartbeats import Pulse
from autoglm_resume.protocol.loss_guard import Bounds, LossGuard

LONGEST = 100
"""Characters of a figure's name."""


class Figures:
    """Of the step that runs, and of the last one that was completed."""

    def __init__(self, pulse: Pulse, bounds: Bounds) -> None:
        self._pulse = pulse
        self._loss = LossGuard(bounds)
        self._shown = 0.0
        self._completed: dict[str, Any] = {}
        self._running: dict[str, Any] = {}

    def report(self, figures: Mapping[str, Any]) -> None:
        """See `Session.report`."""
        for name, value in figures.items():
            _check(name, value)
            if value is not None:
                self._running[name] = value
        loss, grad_norm = figures.get("loss"), figures.get("grad_norm")
        now = time.monotonic()
        if _on_device(loss) or _on_device(grad_norm):
            if now - self._shown < 1:
                return
            self._shown = now
        read = _number(loss)
        self._pulse.report(read, _number(grad_norm))
        if read is not None:
            self._loss.see(read)

    def step_done(self) -> None:
        """What was reported is of the step that is complete now."""
        self._completed, self._running = self._running, {}

    def of_state(self) -> None:
        """What was reported since is of the completed step, too: an evaluation after it."""
        self._completed.update(self._running)
        self._running = {}

    def of_completed(self) -> dict[str, float]:
        """Finite numbers only."""
        found = {name: _number(value) for name, value in self._completed.items()}
        return {name: v for name, v in found.items() if v is not None and math.isfinite(v)}


def _on_device(value: Any | None) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _check(name: str, value: Any) -> None:
    """Raises UsageError for what is no figure; does not wait for a device."""
    expected = ""
    if not name or len(name) > LONGEST:
        expected = f"a name of 1 to {LONGEST} characters"
    elif isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            expected = f"a real number, found a tensor of {list(value.shape)}, {value.dtype}"
    else:
        try:
            _number(value)
        except (TypeError, ValueError, OverflowError):
            expected = f"a number or a tensor of one, found {type(value).__name__}"
    if expected:
        raise UsageError(f"session.report({name[:LONGEST]}=…): expected {expected}")


def _number(value: Any | None) -> float | None:
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return None if value is None else float(value)
