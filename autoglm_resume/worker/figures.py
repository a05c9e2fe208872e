"""What a script reports of its steps: shown in the heartbeat, guarded, and saved with the state."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from autoglm_resume.protocol.heartbeats import Pulse
from autoglm_resume.protocol.loss_guard import Bounds, LossGuard


class Figures:
    """Of the step that runs, and of the last one that was completed."""

    def __init__(self, pulse: Pulse, bounds: Bounds) -> None:
        self._pulse = pulse
        self._loss = LossGuard(bounds)
        self._shown = 0.0
        self._completed: dict[str, Any] = {}
        self._running: dict[str, Any] = {}

    def report(self, loss: Any | None, grad_norm: Any | None) -> None:
        """See `Session.report`."""
        figures = {"loss": loss, "grad_norm": grad_norm}
        self._running.update({k: v for k, v in figures.items() if v is not None})
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

    def of_completed(self) -> dict[str, float]:
        """Finite numbers only."""
        found = {name: _number(value) for name, value in self._completed.items()}
        return {name: v for name, v in found.items() if v is not None and math.isfinite(v)}


def _on_device(value: Any | None) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _number(value: Any | None) -> float | None:
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return None if value is None else float(value)
