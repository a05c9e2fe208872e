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

from autoglm_resume.protocol.heartbeats import Pulse


class Request(NamedTuple):
    """What is due now that a step is complete."""

    save: bool = False
    stop: bool = False


class Requests(Protocol):
    """Asked at every step boundary."""

    def at(self, completed: int) -> Request:
        """What is due after `completed` steps."""
        ...


class FromSupervisor:
    """Reads the board, and obeys the drill that makes a rank exit."""

    def __init__(self, pulse: Pulse, rank: int) -> None:
        self._pulse = pulse
        self._rank = rank

    def at(self, completed: int) -> Request:
        control = self._pulse.control()
        if control.exit_rank == self._rank and completed >= control.exit_at:
            os._exit(control.exit_code)
        return Request(completed == control.save_at, completed == control.stop_at)


class FromClock:
    """One process alone: its own clock will do."""

    def __init__(self, every_seconds: float | None) -> None:
        self._every = every_seconds
        self._last = time.monotonic()

    def at(self, completed: int) -> Request:
        now = time.monotonic()
        if self._every is None or now - self._last < self._every:
            return Request()
        self._last = now
        return Request(save=True)


class FromRankZero:
    """Several processes under plain torchrun: rank 0 announces, the others look twice a second."""

    LOOK = 0.5
    AHEAD = 3.0
    """Seconds between announcing and saving, several times what a look may be late."""

    def __init__(self, rank: int, every_seconds: float | None) -> None:
        self._rank = rank
        self._every = every_seconds
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._last = self._looked = self._previous = time.monotonic()
        self._fastest = math.inf
        self._save_at = -1

    def at(self, completed: int) -> Request:
        if self._every is None:
            return Request()
        now = time.monotonic()
        # By the fastest step of late: others may hurry on while one slow step delays this rank.
        self._fastest = min(now - self._previous, 1.02 * self._fastest)
        self._previous = now
        if self._rank == 0:
            self._announce(completed, now)
        elif now - self._looked >= self.LOOK:
            self._looked = now
            if self._store.check(["autoglm/save_at"]):
                self._save_at = int(self._store.get("autoglm/save_at"))
        return Request(save=completed == self._save_at)

    def _announce(self, completed: int, now: float) -> None:
        due = now - self._last >= (self._every or math.inf) and completed > self._save_at
        # Steps became so fast that the announced one is here before the others can have looked.
        too_soon = completed == self._save_at and now - self._last < 2 * self.LOOK
        if due or too_soon:
            self._last = now
            self._save_at = completed + 2 + math.ceil(self.AHEAD / max(self._fastest, 1e-4))
            self._store.set("autoglm/save_at", str(self._save_at))
