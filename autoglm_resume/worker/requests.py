"""Saves and stops that fall due by the clock or on request, agreed by all ranks without waiting.

Ranks must save at the *same* step, and none may wait for another. So a save is announced for a
step that lies a little ahead of everyone: by the supervisor through the board, or, without a
supervisor, by rank 0 through the process group's store.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Pulse
from autoglm_resume.worker.base.settings import Settings


class Due(NamedTuple):
    """What is due now that a step is complete."""

    save: bool = False
    stop: bool = False


class Requests(Protocol):
    """Asked at every step boundary."""

    def at(self, completed: int) -> Due:
        """What is due after `completed` steps."""
        ...


def find(pulse: Pulse, settings: Settings, assignment: Assignment | None) -> Requests:
    """From whom this rank hears them."""
    if assignment is not None:
        return FromSupervisor(pulse, settings.rank)
    if settings.world_size > 1 and dist.is_initialized():
        return FromRankZero(settings.rank, settings.every_seconds)
    return FromClock(settings.every_seconds if settings.world_size == 1 else None)


class FromSupervisor:
    """Reads the board, and obeys the drill that makes a rank exit."""

    def __init__(self, pulse: Pulse, rank: int) -> None:
        self._pulse = pulse
        self._rank = rank

    def at(self, completed: int) -> Due:
        control = self._pulse.control()
        if control.exit_rank == self._rank and completed >= control.exit_at:
            os._exit(control.exit_code)
        return Due(completed == control.save_at, completed == control.stop_at)


class FromClock:
    """One process alone: its own clock will do."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every = every_seconds
        self._last = time.monotonic()

    def at(self, completed: int) -> Due:
        now = time.monotonic()
        if self._every is None or now - self._last < self._every:
            return Due()
        self._last = now
        return Due(save=True)


class FromRankZero:
    """Several processes under plain torchrun: rank 0 announces, the others check twice a second."""

    CHECK_SECONDS = 0.5
    AHEAD = 3.0
    """Seconds between announcing and saving, several times what a check may be late."""

    def __init__(self, rank: int, every_seconds: float | None) -> None:
        self._rank = rank
        self._every = every_seconds
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._last = self._checked = self._previous = time.monotonic()
        self._fastest = math.inf
        self._save_at = -1

    def at(self, completed: int) -> Due:
        if self._every is None:
            return Due()
        now = time.monotonic()
        # By the fastest step of late: others may hurry on while one slow step delays this rank.
        self._fastest = min(now - self._previous, 1.02 * self._fastest)
        self._previous = now
        if self._rank == 0:
            self._announce(completed, now)
        elif now - self._checked >= self.CHECK_SECONDS:
            self._checked = now
            if self._store.check(["autoglm/save_at"]):
                self._save_at = int(self._store.get("autoglm/save_at"))
        return Due(save=completed == self._save_at)

    def _announce(self, completed: int, now: float) -> None:
        due = now - self._last >= (self._every or math.inf) and completed > self._save_at
        # Steps became so fast that the announced one is here before the others can have checked.
        too_soon = completed == self._save_at and now - self._last < 2 * self.CHECK_SECONDS
        if due or too_soon:
            self._last = now
            self._save_at = completed + 2 + math.ceil(self.AHEAD / max(self._fastest, 1e-4))
            self._store.set("autoglm/save_at", str(self._save_at))
