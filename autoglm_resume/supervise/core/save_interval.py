"""How long to train between two saves: `every: auto`. Pure.

With little time between them the saves cost too much, with much a failure does. The loss is least
at about √(2 · cost of a save · mean time between failures): J. W. Young, “A first order
approximation to the optimum checkpoint interval”, CACM 17(9), 1974; J. T. Daly, “A higher order
estimate of the optimum checkpoint interval for restart dumps”, FGCS 22(3), 2006, whose further
terms matter only where failures come nearly as fast as saves. An interval twice too long or too
short loses a quarter more than the best one, so rough estimates will do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from autoglm_resume.job.units import format_duration

PRIOR: Final = 86_400.0
"""Seconds that a node is taken to have run, with one failure, before this run began.

Well-kept clusters do better (Llama 3: one unexpected interruption in about 260 node-days), spare
capacity and new scripts worse; what the run itself shows outweighs it soon.
"""
FIRST: Final = 5.0
"""Seconds until the first save: it shows what they cost, and a run that fails every half minute
must come to it."""
SHORTEST: Final = 1.0
"""Seconds: a failure costs a restart anyway, beside which losing less would not be noticed."""
LONGEST: Final = 3600.0
"""Seconds: failures come in bursts, and nobody should lose more than an hour to an estimate."""
LARGEST_SHARE: Final = 0.1
"""Of the time that may go to saves. It binds where failures come within 50 times the cost of a
save, and the formula does not hold any more."""
BUSIEST: Final = 0.5
"""Share of the time in which a checkpoint may be on its way to storage, even if no step feels it:
others use that storage too, and a save that finds the last one unfinished is skipped."""


@dataclass(frozen=True)
class Interval:
    """Seconds between two saves, and why: one sentence with the numbers."""

    seconds: float
    reason: str


def choose(
    costs: Collection[float],
    failures: int,
    elapsed: float,
    *,
    writing: Collection[float] = (),
    since: float = math.inf,
    nodes: int = 1,
) -> Interval:
    """The interval that fits what this run has measured so far; all times are seconds.

    `costs`: what each of the latest saves took from the training, blocked and slowed down together.
    Their median counts: the first save, or one beside a busy neighbour, says little of the next.
    `failures` in `elapsed` seconds of training on `nodes` machines. `writing`: from snapshot to
    committed, of the latest saves. `since`: how long ago this run began, or failed last.
    """
    if not costs:
        return Interval(FIRST, f"every {_about(FIRST)} until a save has shown what it costs")
    cost = max(0.0, statistics.median(costs))
    busy = statistics.median(writing) if writing else 0.0
    usual = (PRIOR / nodes + elapsed) / (1 + failures)
    # What has just begun may fail as soon again: of a new script, or a sick machine, a prior knows
    # nothing. To save often at first costs √(2 · cost · time) in all, which is 1 % after an hour.
    between = min(usual, since)
    best = math.sqrt(2 * cost * between)
    seconds, bound = min(
        (best, ""),
        (LONGEST, f"{_about(LONGEST)} is the longest"),
    )
    seconds, bound = max(
        (seconds, bound),
        (SHORTEST, f"{_about(SHORTEST)} is the shortest"),
        (cost / LARGEST_SHARE, f"more saves would take more than {LARGEST_SHARE:.0%}"),
        (busy / BUSIEST, f"writing one takes {_about(busy)}"),
    )
    happened = f"{failures or 'no'} {'failure' if failures < 2 else 'failures'}"
    reason = f"a save costs {_about(cost)}, {happened} in {_about(elapsed)} so far"
    if between < usual:
        reason += f", and it has only gone on for {_about(since)}"
    return Interval(seconds, "; ".join(filter(None, (f"every {_about(seconds)}: {reason}", bound))))


def _about(seconds: float) -> str:
    """As in a job file, in two units at most: `50ms`, `4m10s`, `3h`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 9.95:
        return f"{seconds:.2g}s"
    unit = 1 if seconds < 600 else 60 if seconds < 36_000 else 3600
    return str(format_duration(round(seconds / unit) * unit))
