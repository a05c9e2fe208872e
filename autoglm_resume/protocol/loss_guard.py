"""Whether a loss still says that the model learns. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from autoglm_resume.errors import LossDiverged

WINDOW = 100
"""Losses whose median is what is usual."""
ENOUGH = 20
LASTS = 3
"""A spike of fewer losses passes."""


@dataclass(frozen=True)
class Bounds:
    """The job's `guards.nan_losses` and `guards.loss_spike`; 0 for what is not watched."""

    nan: int = 0
    """Losses in a row that are not finite."""
    spike: int = 0
    """Times the median of late."""


class LossGuard:
    """Sees every loss that is reported."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._lost = 0
        self._high = 0

    def see(self, loss: float) -> None:
        """Raises LossDiverged when training cannot come back from here."""
        bounds = self._bounds
        if not math.isfinite(loss):
            self._lost += 1
            if bounds.nan and self._lost >= bounds.nan:
                raise LossDiverged(
                    f"the loss was {loss} in {_in_a_row(self._lost)}",
                    hint="see guards.nan_losses",
                )
            return
        self._lost = 0
        if len(self._usual) >= ENOUGH and bounds.spike:
            usual = statistics.median(self._usual)
            if loss > bounds.spike * usual > 0:
                self._high += 1
                if self._high >= LASTS:
                    raise LossDiverged(
                        f"the loss was {loss:.4g}, more than {bounds.spike} times its median of "
                        f"{usual:.4g}, in {_in_a_row(self._high)}",
                        hint="see guards.loss_spike",
                    )
                return
        self._high = 0
        self._usual.append(loss)


def _in_a_row(count: int) -> str:
    return "one report" if count == 1 else f"{count} reports in a row"
