"""Watches the ranks of one attempt for silence: who is silent, and what is usual here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autoglm_resume.protocol import silences
from autoglm_resume.protocol.heartbeats import Beat, Board, Phase
from autoglm_resume.protocol.silences import Counts, merged
from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.core import liveness
from autoglm_resume.supervise.core.history import Silences
from autoglm_resume.supervise.core.liveness import Limits, Look
from autoglm_resume.supervise.ranks.script_ends import CPU_NOISE

FROZEN = 5.0
"""Seconds between two looks after which this machine must have stood still."""
ASK = 5.0
"""Seconds between two looks at a silent rank's use of processors."""
IDLE_SHARE = 0.02
"""Share of a processor that threads of libraries take though nothing is done."""


@dataclass
class _Rank:
    """What is remembered of one rank between two looks."""

    silent_since: int = 0
    """Time of the beat that its present silence began with."""
    waited: dict[Phase, int] = field(default_factory=dict)
    excused: int = 0
    """The beat whose silence was counted as waiting already."""
    cpu: float = 0.0
    """Processor seconds when it was seen to be busy last."""
    busy: float = 0.0
    """Monotonic seconds of that."""
    asked: float = 0.0
    """When its processor time was asked for last: that takes milliseconds."""
    idle: bool = False


class HangDetector:
    """The detector of one attempt. `past` are the silences of earlier ones."""

    def __init__(self, board: Board, limits: Limits, past: Silences) -> None:
        self._board = board
        self._limits = limits
        self._past = past
        self._ranks = [_Rank() for _ in range(board.world_size)]
        self._ticked = self._awake = time.monotonic()
        self._endured: dict[int, dict[int, Counts]] = {}
        """The silences that ended the attempt."""
        self._last: Mapping[int, Look] = {}

    def looks(self, now: float, pids: Mapping[int, int]) -> dict[int, Look]:
        """What `liveness.hung` judges at monotonic time `now`, of the ranks that live as `pids`.

        None while every one of them beats: then there is nothing to judge.
        """
        if now - self._ticked > FROZEN:
            self._awake = now  # a suspended machine: nobody had a chance to beat
        self._ticked = now
        awake = int(self._awake * 1e9)
        beats = {
            rank: replace(beat, time=max(beat.time, awake)) if beat.time else beat
            for rank, beat in enumerate(self._board.beats())
            if rank in pids
        }
        if all(liveness.silence(beat, now) <= self._shortest for beat in beats.values()):
            return {}
        looks = {rank: self._look(rank, beat, now, pids[rank]) for rank, beat in beats.items()}
        for rank in liveness.waiting(looks):
            self._excuse(rank, beats[rank], now)
        self._last = looks
        return looks

    def condemn(self, ranks: Iterable[int], now: float) -> None:
        """These hang: if they would have gone on, the next attempt must wait longer for them."""
        for rank in ranks:
            look = self._last[rank]
            if not look.stopped:
                silent = int(liveness.silence(look.beat, now) * 1e9)
                self._endured[rank] = {int(look.beat.phase): {silences.bucket(silent): 1}}

    def spent(self) -> list[dict[int, float]]:
        """Seconds of each rank so far, by phase."""
        phases = [int(phase) for phase in Phase if phase is not Phase.NONE]
        return [{phase: rank.seconds(phase) for phase in phases} for rank in self._board.silences]

    def silences(self) -> dict[int, dict[int, Counts]]:
        """Those of this attempt by rank and phase, for the journal."""
        found = {}
        for rank, histogram in enumerate(self._board.silences):
            own = {
                phase: liveness.without_longest(counts, self._waited(rank, Phase(phase)))
                for phase, counts in histogram.all().items()
            }
            found[rank] = merged([own, self._endured.get(rank, {})])
        return found

    @property
    def _shortest(self) -> float:
        return min(liveness.FLOOR, self._limits.timeout, self._limits.startup)

    def _look(self, rank: int, beat: Beat, now: float, pid: int) -> Look:
        silent = liveness.silence(beat, now) > self._shortest
        known = merged([self._past.get(rank, {}), self._board.silences[rank].all()])
        waited = self._waited(rank, beat.phase)
        if not silent:
            return Look(beat, known, waited)
        stopped = machine.state(pid) == "stopped"
        return Look(beat, known, waited, stopped, self._idle(rank, beat, now, pid))

    def _waited(self, rank: int, phase: Phase) -> int:
        return self._ranks[rank].waited.get(phase, 0)

    def _idle(self, rank: int, beat: Beat, now: float, pid: int) -> bool:
        """Whether neither the rank nor a child of it has used a processor for some time."""
        memory = self._ranks[rank]
        if memory.silent_since == beat.time and now - memory.asked < ASK:
            return memory.idle
        memory.asked, used = now, machine.cpu_seconds(pid)
        if memory.silent_since != beat.time:
            memory.silent_since, memory.idle = beat.time, False
            memory.cpu, memory.busy = used, now
        elif used - memory.cpu > CPU_NOISE + IDLE_SHARE * (now - memory.busy):
            memory.cpu, memory.busy, memory.idle = used, now, False
        else:
            memory.idle = True
        return memory.idle

    def _excuse(self, rank: int, beat: Beat, now: float) -> None:
        """A silence that is spent waiting must not make this rank's own look usual."""
        memory = self._ranks[rank]
        if liveness.silence(beat, now) > self._shortest and memory.excused != beat.time:
            memory.excused = beat.time
            memory.waited[beat.phase] = memory.waited.get(beat.phase, 0) + 1
