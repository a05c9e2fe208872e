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
NOTABLE = 1.25
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
        self._blocked: deque[float] = deque(maxlen=RECENT)
        self._felt: deque[float] = deque(maxlen=RECENT)
        self._writing: deque[float] = deque(maxlen=RECENT)
        self._began = time.monotonic()
        self._attempt = self._began
        """Monotonic seconds at which the present attempt began."""
        asked = job.checkpoint.every.seconds
        self._auto = asked == "auto"
        self.seconds: float | None = None if asked == "auto" else asked
        """Between two saves; None where only steps count."""

    def saved(self, blocked: float, seconds: float) -> None:
        """A save kept its rank for `blocked` seconds and was on storage after `seconds`."""
        self._blocked.append(blocked)
        self._writing.append(seconds)
        self.choose()

    def felt(self, seconds: float) -> None:
        """A save cost training so much: held up, and slower steps beside it."""
        self._felt.append(seconds)

    def attempt(self) -> None:
        """Another attempt begins, as a rule because the last one failed."""
        self._attempt = time.monotonic()
        self.choose()

    def choose(self) -> None:
        """Think about it anew, and say so if something notable comes of it."""
        if not self._auto:
            return
        now = time.monotonic()
        chosen = save_interval.choose(
            self._felt or self._blocked,
            self._failures(),
            self._trained + now - self._began,
            writing=self._writing,
            since=now - self._attempt,
        )
        if self.seconds is None or not 1 / NOTABLE < chosen.seconds / self.seconds < NOTABLE:
            self.seconds = chosen.seconds
            self._tell(events.SaveInterval(seconds=chosen.seconds, reason=chosen.reason))
