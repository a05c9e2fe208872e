"""Which rank has stopped making progress. Pure: looks and `now` go in.

A phi-accrual detector (Hayashibara et al., “The φ accrual failure detector”, SRDS 2004) over the
run's own silences between beats, phase by phase, as a log-normal distribution. It only judges ranks
that use no processor: one that computes may compile, evaluate or wait for a GPU where no beat tells
of it, and has the limits of the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoglm_resume.protocol import silences
from autoglm_resume.protocol.heartbeats import Beat, Phase
from autoglm_resume.protocol.silences import Counts

FLOOR = 1.0
"""Seconds of silence that are never held against a rank."""
ENOUGH = 20
"""Silences that make a distribution."""
Z = 7.03
"""Standard deviations of a normal distribution that come up once in 10^12."""
BEYOND = 8.0
"""Nor is a rank suspected before its silence is so many times the longest one seen."""
NARROWEST = 0.3
"""Standard deviation of the logarithm of a silence at least: a bucket is that coarse."""
IDLE = 30.0
"""Seconds of silence after which a rank that uses no processor may be suspected: storage stalls."""

_STARTS = (Phase.NONE, Phase.START, Phase.RESTORE)
_ORDER = {Phase.FORWARD: 1, Phase.BACKWARD: 2, Phase.OPTIMIZER: 3, Phase.STEPPED: 4}
"""Within a step; all else is before."""


@dataclass(frozen=True)
class Limits:
    """The job's `heartbeat`, in seconds."""

    timeout: float
    startup: float


@dataclass(frozen=True)
class Look:
    """What is known of one rank now."""

    beat: Beat
    silences: Mapping[int, Counts]
    """Its own, by phase, those of earlier attempts included."""
    waited: int = 0
    """How many of the longest ones in its present phase were spent waiting for others."""
    stopped: bool = False
    """Whether its process is stopped (SIGSTOP)."""
    idle: bool = False
    """Whether neither its process nor a child has used a processor since it fell silent."""


def hung(looks: Mapping[int, Look], now: float, limits: Limits) -> list[int]:
    """Ranks that have been silent for longer than they may, at monotonic time `now`.

    `looks` are at the ranks that live. One that is ahead of another waits for it in a collective,
    so only those count that keep the others waiting. A script without a session never beats, and
    is not judged; but where other ranks have one, this rank is late with its own.
    """
    if all(look.beat.phase is Phase.NONE for look in looks.values()):
        return []
    late = {rank for rank, look in looks.items() if _is_late(look, now, limits)}
    last = _last(looks)
    suspects = {rank for rank in late if rank in last or _stands_alone(looks[rank])}
    if suspects & last:
        # Each has a patience of its own; but of those that stand where they stand, silent too,
        # any may be the one that the others wait for.
        shortest = min(FLOOR, limits.timeout)
        suspects |= {rank for rank in last if silence(looks[rank].beat, now) > shortest}
    return sorted(suspects)


def waiting(looks: Mapping[int, Look]) -> list[int]:
    """Ranks that others are behind of: their silence is not of their own making."""
    last = _last(looks)
    return [r for r, look in looks.items() if r not in last and look.beat.phase is not Phase.DONE]


def silence(beat: Beat, now: float) -> float:
    """Seconds since the last beat, 0 if there was none."""
    return max(0.0, now - beat.time / 1e9) if beat.time else 0.0


def patience(look: Look, limits: Limits) -> float:
    """Seconds for which this rank may be silent where it is."""
    beat = look.beat
    if look.stopped and beat.phase is not Phase.NONE:
        return min(FLOOR, limits.timeout)
    if beat.phase is Phase.DONE:  # an export may take hours; one that does nothing hangs
        return limits.startup if look.idle else math.inf
    if beat.phase in _STARTS or not beat.first_step_time:
        return limits.startup
    if beat.phase is Phase.SAVE:
        return limits.startup  # large checkpoints take minutes, and nothing beats meanwhile
    if not look.idle:
        return limits.timeout
    counts = look.silences.get(int(beat.phase), {})
    return min(limits.timeout, max(IDLE, expected(counts, look.waited)))


def expected(counts: Counts, waited: int = 0) -> float:
    """Seconds that no silence is expected to last, infinite if that cannot be known yet.

    The `waited` longest ones do not count.
    """
    own = without_longest(counts, waited)
    if sum(own.values()) < ENOUGH:
        return math.inf
    mean, deviation = _fit(own)
    return max(math.exp(mean + Z * deviation), BEYOND * silences.longest(max(own)))


def health(look: Look, now: float, limits: Limits, load: float = 1.0) -> float:
    """From 1, a rank that beats as ever, to 0, one that counts as hung.

    `load` is that of the machine, per processor: where it is high, beats are late.
    """
    silent = silence(look.beat, now) / max(1.0, load)
    if silent <= FLOOR or look.beat.phase in (Phase.NONE, Phase.DONE):
        return 1.0
    return max(0.0, 1.0 - silent / patience(look, limits))


def agreed_step(beats: Sequence[Beat], step_seconds: float, ahead: float = 0.25) -> int:
    """A step that no rank has passed, a little ahead of all: there all can save without waiting.

    `step_seconds` is the time a step takes now, 0 if unknown; the ranks get `ahead` seconds to
    see the request, which they look for at every step boundary.
    """
    furthest = max((beat.step for beat in beats), default=0)
    return furthest + 2 + (int(ahead / step_seconds) if step_seconds > 0 else 0)


@dataclass
class StepRate:
    """How fast steps complete, from looks at the beats."""

    step: int = -1
    since: float = 0.0
    seconds: float = 0.0
    """Of one step, by the last two looks that differed; 0 if unknown."""

    def see(self, step: int, at: float) -> None:
        """Look: the rank had completed `step` steps at monotonic time `at` (of its last beat)."""
        if step > self.step:
            if self.step >= 0:
                self.seconds = (at - self.since) / (step - self.step)
            self.step, self.since = step, at

    @property
    def rate(self) -> float:
        """Steps per second, 0 if unknown."""
        return 1 / self.seconds if self.seconds > 0 else 0.0


def _position(beat: Beat) -> tuple[int, int]:
    return beat.step, _ORDER.get(beat.phase, 0)


def _last(looks: Mapping[int, Look]) -> set[int]:
    """The ranks that no other is behind of; one that is done is in nobody's way."""
    going = {r: _position(o.beat) for r, o in looks.items() if o.beat.phase is not Phase.DONE}
    return {rank for rank, position in going.items() if position == min(going.values())}


def _is_late(look: Look, now: float, limits: Limits) -> bool:
    return silence(look.beat, now) > patience(look, limits)


def _stands_alone(look: Look) -> bool:
    """Whether no other rank can be what it waits for."""
    return look.stopped or look.beat.phase is Phase.DONE


def without_longest(counts: Counts, number: int) -> Counts:
    """`counts` without the `number` longest silences."""
    left = dict(sorted(counts.items()))
    for at in sorted(left, reverse=True):
        taken = min(number, left[at])
        left[at] -= taken
        number -= taken
    return {at: count for at, count in left.items() if count}


def _fit(counts: Counts) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of the silences, in seconds."""
    total = sum(counts.values())
    logs = {at: math.log(max(silences.longest(at), 1e-9)) for at in counts}
    mean = sum(logs[at] * count for at, count in counts.items()) / total
    variance = sum((logs[at] - mean) ** 2 * count for at, count in counts.items()) / total
    return mean, max(NARROWEST, math.sqrt(variance))
