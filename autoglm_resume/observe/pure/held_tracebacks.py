"""Tracebacks among the lines that ranks print, held back until it is known what becomes of them.

Most go on to end the attempt, in one rank after the other: then the one of the first rank to fail
is shown, once. A script that prints one and goes on has it shown a moment later. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PATIENCE = 1.0
"""Seconds."""
MOST = 500
"""Lines of a rank."""

_MARK = re.compile(r"\[rank\d+\]: ?")
"""What torch puts before each line of one."""
_START = "Traceback (most recent call last):"
_BETWEEN = (
    "",
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)

Lines = list[tuple[int, str]]
"""(rank, line)"""


class HeldTracebacks:
    """From the first line of a traceback on, all that a rank prints, for a moment."""

    def __init__(self) -> None:
        self._held: dict[int, list[str]] = {}
        self._since: dict[int, float] = {}

    def take(self, rank: int, line: str, now: float) -> Lines:
        """Add a line that `rank` printed `now`; returns what is to be shown."""
        if rank not in self._held:
            if _bare(line) != _START:
                return [(rank, line)]
            self._since[rank] = now
        held = self._held.setdefault(rank, [])
        held.append(line)
        return self._release(lambda each: each == rank and len(held) > MOST) + self.due(now)

    def due(self, now: float) -> Lines:
        """What was held for long enough."""
        return self._release(lambda rank: now - self._since[rank] > PATIENCE)

    def all(self) -> Lines:
        """What is left, to be shown as it is."""
        return self._release(lambda rank: True)

    def without(self, traceback: str) -> tuple[Lines, list[int]]:
        """What is left but tracebacks, of which `traceback` stands for all; whose they were."""
        known = {line.rstrip() for line in traceback.splitlines()}
        left: Lines = []
        raised = sorted(self._held)
        inside = False
        for rank, line in self.all():
            bare = _bare(line)
            if bare == _START:
                inside = True
            elif inside:
                inside = bare[:1] in ("", " ")
            elif bare not in known and bare not in _BETWEEN:
                left.append((rank, line))
        return left, raised

    def _release(self, wanted: Callable[[int], bool]) -> Lines:
        ranks = [rank for rank in self._held if wanted(rank)]
        return [(rank, line) for rank in ranks for line in self._held.pop(rank)]


def _bare(line: str) -> str:
    return _MARK.sub("", line, count=1).rstrip()
