"""What a save takes from training: the time it is held up, and the steps that are slower. Pure."""

from __future__ import annotations

import statistics
from collections import deque

CALM = 20
"""Steps beside which nothing was saved, that tell how long one takes."""
LEAST = 3
"""Of these, to tell anything."""


class StepTimes:
    """Of one rank; `step` is called when a step is complete, `begin` when a save begins."""

    def __init__(self) -> None:
        self._calm: deque[float] = deque(maxlen=CALM)
        self._slowed: list[float] = []
        self._last: float | None = None
        self._saving = False
        """Whether the step that runs has a save beside it."""

    def begin(self) -> float | None:
        """A save begins; returns what the one before has cost, as `step`."""
        cost = self._conclude()
        self._saving = True
        return cost

    def step(self, now: float, *, busy: bool) -> float | None:
        """A step was complete at `now`, a monotonic time; `busy`: a save is still under way.

        Returns the seconds that a save has cost, once it is over.
        """
        last, self._last = self._last, now
        saving, self._saving = self._saving, busy
        if last is None:
            return None
        if saving:
            self._slowed.append(now - last)
            return None
        cost = self._conclude()
        self._calm.append(now - last)
        return cost

    def _conclude(self) -> float | None:
        slowed, self._slowed = self._slowed, []
        if not slowed or len(self._calm) < LEAST:
            return None
        return sum(slowed) - len(slowed) * statistics.median(self._calm)
