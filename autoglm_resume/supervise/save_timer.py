"""How often the ranks of a run save by the clock: as the job says, or as this run was measured."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from autoglm_resume import events
from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.core import save_interval

RECENT = 20
"""Saves that tell what the next will cost."""
NOTABLE = 1.2
"""Factor by which the interval between saves must change to be changed."""


class SaveTimer:
    """The interval of one life of a supervisor; `failures` counts those of the whole run."""

    def __init__(
        self, job: Job, trained: float, failures: Callable[[], int], tell: events.Tell
    ) -> None:
        """`trained` are the seconds that earlier attempts took."""
        self._trained = trained
        self._failures = failures
        self._tell = tell
        self._costs: deque[float] = deque(maxlen=RECENT)
        self._writing: deque[float] = deque(maxlen=RECENT)
        self._began = time.monotonic()
        asked = job.checkpoint.every.seconds
        self._auto = asked == "auto"
        self.seconds: float | None = None if asked == "auto" else asked
        """Between two saves; None where only steps count."""

    def saved(self, blocked: float, seconds: float) -> None:
        """A save kept its rank for `blocked` seconds and was on storage after `seconds`."""
        self._costs.append(blocked)
        self._writing.append(seconds)
        self.choose()

    def choose(self) -> None:
        """Think about it anew, and say so if something notable comes of it."""
        if not self._auto:
            return
        elapsed = self._trained + time.monotonic() - self._began
        chosen = save_interval.choose(self._costs, self._failures(), elapsed, writing=self._writing)
        if self.seconds is None or not 1 / NOTABLE < chosen.seconds / self.seconds < NOTABLE:
            self.seconds = chosen.seconds
            self._tell(events.SaveInterval(seconds=chosen.seconds, reason=chosen.reason))
