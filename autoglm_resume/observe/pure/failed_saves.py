"""Saves that fail one after the other, in every rank, of one cause: told once, counted. Pure."""

from __future__ import annotations

import re

from autoglm_resume.events import PartFailed
from autoglm_resume.observe.pure.say import plural

_NUMBER = re.compile(r"\d+")


class FailedSaves:
    """Those since the last checkpoint."""

    def __init__(self) -> None:
        self._causes: set[str] = set()
        self._steps: set[int | None] = set()

    def again(self, failed: PartFailed) -> bool:
        """Whether its cause was said already; it counts then."""
        # Steps, ranks and sizes are in paths and in what the system says.
        cause = _NUMBER.sub("#", failed.reason)
        if cause not in self._causes:
            self._causes.add(cause)
            self._steps = self._steps or {failed.step}
            return False
        self._steps.add(failed.step)
        return True

    def over(self) -> str:
        """How many more saves failed of what was said; empty if none did."""
        more = len(self._steps) - 1
        self._causes, self._steps = set(), set()
        return f"{plural(more, 'more save')} had failed of the same cause" if more > 0 else ""
