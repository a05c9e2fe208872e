"""Watches the ranks of one attempt for silence: who hangs, who is slow, and what is usual here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoglm_resume.supervise import liveness, node
from autoglm_resume.supervise.history import Silences
from autoglm_resume.supervise.liveness import Limits, Look
from autoglm_resume.worker.board import Beat, Board, Phase
from autoglm_resume.worker.gaps import Counts, merged

FROZEN = 5.0
"""Seconds between two looks after which this machine must have stood still."""
WINDOW = 30.0
"""Seconds over which stragglers are looked for, and steps in them at least."""
STEPS = 20
CPU_NOISE = 0.05
IDLE_SHARE = 0.02
"""Processor seconds, and share of one, that threads of libraries take though nothing is done."""


@dataclass
class _Rank:
    """What is remembered of one rank between two looks."""

    silent_since: int = 0
    """Time of the beat that its present silence began with."""
    waited: dict[Phase, int] = field(default_factory=dict)
    excused: int = 0
    """The beat whose silence was counted as waiting already."""
    cpu: float = 0.0
    """Processor seconds when it was seen to be silent first."""


class Vigil:
    """The detector of one attempt. `past` are the silences of earlier ones."""

    def __init__(self, board: Board, limits: Limits, past: Silences) -> None:
        self._board = board
        self._limits = limits
        self._past = past
        self._ranks = [_Rank() for _ in range(board.world_size)]
        self._ticked = self._awake = time.monotonic()
        self._window: tuple[float, int, list[dict[int, float]]] | None = None
        self.slow: dict[int, float] = {}
        """Stragglers, and how many times slower than their peers they are."""

    def look(self, now: float, pids: Mapping[int, int]) -> list[int]:
        """Ranks that hang at monotonic time `now`, of those that live as `pids`."""
        if now - self._ticked > FROZEN:
            self._awake = now  # a suspended machine: nobody had a chance to beat
        self._ticked = now
        awake = int(self._awake * 1e9)
        beats = [
            replace(beat, time=max(beat.time, awake)) if beat.time else beat
            for beat in self._board.beats()
        ]
        if all(liveness.silence(beat, now) <= self._shortest for beat in beats):
            return []
        looks = [self._look(rank, beat, now, pids.get(rank)) for rank, beat in enumerate(beats)]
        for rank in liveness.waiting(looks):
            self._excuse(rank, beats[rank], now)
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        return [rank for rank in liveness.hung(looks, now, self._limits, load) if rank in pids]

    def find_stragglers(self, now: float, step: int) -> dict[int, float]:
        """Look for them once per WINDOW; returns those that were none before."""
        if self._window is not None:
            began, first, before = self._window
            if now - began < WINDOW or step - first < STEPS:
                return {}
            spent = [
                {phase: value - then.get(phase, 0.0) for phase, value in rank.items()}
                for rank, then in zip(self._spent(), before, strict=True)
            ]
            found = liveness.stragglers(spent, step - first)
        else:
            found = {}
        self._window = (now, step, self._spent())
        new = {rank: ratio for rank, ratio in found.items() if rank not in self.slow}
        self.slow = found
        return new

    def silences(self) -> dict[int, dict[int, Counts]]:
        """Those of this attempt by rank and phase, for the journal."""
        return {
            rank: {
                phase: liveness.without_longest(counts, self._waited(rank, Phase(phase)))
                for phase, counts in one.all().items()
            }
            for rank, one in enumerate(self._board.gaps)
        }

    @property
    def _shortest(self) -> float:
        return min(liveness.FLOOR, self._limits.timeout, self._limits.startup)

    def _look(self, rank: int, beat: Beat, now: float, pid: int | None) -> Look:
        silent = liveness.silence(beat, now) > self._shortest
        known = merged([self._past.get(rank, {}), self._board.gaps[rank].all()])
        waited = self._waited(rank, beat.phase)
        if not silent or pid is None:
            self._ranks[rank].silent_since = 0
            return Look(beat, known, waited)
        stopped = node.state(pid) == "stopped"
        return Look(beat, known, waited, stopped, self._idle(rank, beat, pid))

    def _waited(self, rank: int, phase: Phase) -> int:
        return self._ranks[rank].waited.get(phase, 0)

    def _idle(self, rank: int, beat: Beat, pid: int) -> bool:
        memory, used = self._ranks[rank], node.cpu_seconds(pid)
        if memory.silent_since != beat.time:
            memory.silent_since, memory.cpu = beat.time, used
            return False
        silent = time.monotonic() - beat.time / 1e9
        return used - memory.cpu < CPU_NOISE + IDLE_SHARE * silent

    def _excuse(self, rank: int, beat: Beat, now: float) -> None:
        """A silence that is spent waiting must not make this rank's own look usual."""
        memory = self._ranks[rank]
        if liveness.silence(beat, now) > self._shortest and memory.excused != beat.time:
            memory.excused = beat.time
            memory.waited[beat.phase] = memory.waited.get(beat.phase, 0) + 1

    def _spent(self) -> list[dict[int, float]]:
        phases = [int(phase) for phase in Phase if phase is not Phase.NONE]
        return [{phase: rank.seconds(phase) for phase in phases} for rank in self._board.gaps]
