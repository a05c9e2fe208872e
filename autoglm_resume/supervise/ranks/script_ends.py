"""Ranks whose scripts have ended, though their processes may not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.ranks.observed import WELL

CPU_NOISE = 0.05
"""Processor seconds that threads of libraries take though nothing is done."""

LAST_WORDS = 10.0
"""Seconds for what a script left to its exit: trackers and writers of logs flush their last lines
there, some over the network."""
TEARDOWN = 1.0
"""Seconds for the interpreter to end after that; what it still does is to flush open files."""


class ScriptEnds:
    """Of the ranks of one attempt.

    A rank that hangs in the interpreter's own end is killed, and its script's result counts. Seen
    with torch 2.13: DDP taking down gloo's threads while it holds the GIL they wait for.
    """

    def __init__(self, patience: float) -> None:
        """`patience` are the seconds that a process may do nothing after its script."""
        self._patience = patience
        self.codes: dict[int, int] = {}
        """Exit codes by rank."""
        self.stuck: set[int] = set()
        """Ranks that did not end after their scripts had."""
        self.finished: dict[int, float] = {}
        """Since when ranks have nothing left to do at their exit, in monotonic seconds."""
        self._ended_at: dict[int, float] = {}
        self._working: dict[int, tuple[float, float]] = {}
        """Processor seconds of those ranks' processes, and since when they have used none."""

    def add(self, rank: int, code: int, mono: float) -> None:
        """The script of `rank` ended at monotonic time `mono`."""
        self.codes[rank] = code
        self._ended_at[rank] = mono

    def newly_stuck(self, now: float, alive: Collection[int], pids: Mapping[int, int]) -> list[int]:
        """Ranks that will not end by themselves, and were not known for it before."""
        found = []
        for rank in [rank for rank in self._ended_at if rank in alive]:
            used = machine.cpu_seconds(pids[rank])
            before, since = self._working.get(rank, (0.0, self._ended_at[rank]))
            if used > before + CPU_NOISE:
                # It takes its time, as a collection of garbage does on a busy machine.
                since = now
            self._working[rank] = used, since
            if now - since > self._patience and rank not in self.stuck:
                self.stuck.add(rank)
                found.append(rank)
        return found

    def failed_before(self, rank: int, broken_at: float | None) -> bool:
        """Whether its script had failed when, or before, the first failure was noticed."""
        if broken_at is None or self.codes.get(rank, 0) in WELL:
            return False
        return self._ended_at[rank] <= broken_at

    def overdue(self, now: float, alive: Collection[int]) -> bool:
        """Whether all of `alive` had time enough to end by themselves after their scripts did."""
        return all(
            now > self._ended_at[rank] + LAST_WORDS or now > self.finished.get(rank, now) + TEARDOWN
            for rank in alive
            if rank in self._ended_at
        )

    def all_well(self, world_size: int) -> bool:
        """Whether every script came to its good end, whatever became of its process."""
        return len(self.codes) == world_size and all(code in WELL for code in self.codes.values())
