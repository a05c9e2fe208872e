"""Which rank is slow: its own work takes longer than that of its peers. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autoglm_resume.protocol.heartbeats import Phase

SLOW = 1.5
"""A rank is a straggler when its own work takes so many times what its peers' takes."""
WINDOW = 30.0
"""Seconds over which stragglers are looked for, and steps in them at least."""
STEPS = 20

_OWN = (Phase.DATA, Phase.FORWARD, Phase.OPTIMIZER, Phase.STEPPED)
"""Phases in which a rank does not wait for others."""

Spent = Sequence[Mapping[int, float]]


def stragglers(spent: Spent, steps: int) -> dict[int, float]:
    """Ranks whose own work takes SLOW times the median of their peers', and how many times.

    `spent` are the seconds of each rank by phase during the last `steps` steps. In its backward
    pass a rank waits for slower ones, so that phase tells nothing. What is less than a tenth of a
    step does not slow anybody down.
    """
    if len(spent) < 2 or steps <= 0:
        return {}
    own = [sum(rank.get(int(phase), 0.0) for phase in _OWN) / steps for rank in spent]
    step = statistics.median(sum(rank.values()) / steps for rank in spent)
    found = {}
    for rank, mine in enumerate(own):
        peers = statistics.median(own[:rank] + own[rank + 1 :])
        if mine > SLOW * peers and mine - peers > 0.1 * step:
            found[rank] = mine / peers if peers > 0 else math.inf
    return found


class _Window(NamedTuple):
    began: float
    step: int
    spent: Spent


@dataclass
class Stragglers:
    """Those of one attempt, looked for once per WINDOW."""

    slow: dict[int, float] = field(default_factory=dict)
    """How many times slower than their peers they are."""
    _window: _Window | None = None

    def look(self, now: float, step: int, spent: Spent) -> dict[int, float]:
        """At monotonic time `now`, after `step` steps; returns those that were none before.

        `spent` are each rank's seconds so far, by phase.
        """
        found: dict[int, float] = {}
        if (window := self._window) is not None:
            if now - window.began < WINDOW or step - window.step < STEPS:
                return {}
            since = [
                {phase: value - then.get(phase, 0.0) for phase, value in rank.items()}
                for rank, then in zip(spent, window.spent, strict=True)
            ]
            found = stragglers(since, step - window.step)
        self._window = _Window(now, step, spent)
        new = {rank: ratio for rank, ratio in found.items() if rank not in self.slow}
        self.slow = found
        return new
