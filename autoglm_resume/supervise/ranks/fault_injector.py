"""Carries out drills on a running group, and says so in the journal before it does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeAlias

from autoglm_resume import events, files
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.protocol.heartbeats import Beat, Control
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.core.drill import Drill, moments

LOOK = 0.005
"""Seconds between looks at the board while a drill waits for a step; only drills are so curious."""

Change: TypeAlias = "Callable[[Callable[[Control], Control]], None]"


class Ranks(Protocol):
    """Those of an attempt, as drills see and strike them."""

    @property
    def alive(self) -> Sequence[int]: ...

    def beats(self) -> tuple[Beat, ...]: ...

    def signal(self, rank: int, number: int) -> None: ...


class FaultInjector:
    """The drills of one run, each of which fires once."""

    def __init__(
        self, loop: EventLoop, drills: Sequence[Drill], store: Store, tell: events.Tell
    ) -> None:
        self._loop = loop
        self._store = store
        self._tell = tell
        self._at_steps = [drill for drill in drills if drill.kind != "random"]
        self._random = [drill for drill in drills if drill.kind == "random"]
        self._plan: list[tuple[float, int, Drill]] | None = None
        self._ranks: Ranks | None = None
        self._change: Change | None = None

    def begin(self, ranks: Ranks, change: Change) -> None:
        """Watch a new attempt; `change` changes what is asked of its ranks."""
        self._ranks, self._change = ranks, change
        if self._at_steps:
            self._loop.every(LOOK, self._look)
        if self._random:
            if self._plan is None:
                self._plan = _plan(self._random, len(ranks.beats()))
            self._loop.every(LOOK, self._strike)

    def end(self) -> None:
        """The attempt is over, or its ranks are about to be stopped."""
        self._loop.cancel(self._look)
        self._loop.cancel(self._strike)
        self._ranks = None

    def _strike(self) -> None:
        ranks = self._ranks
        if ranks is None or not self._plan or time.monotonic() < self._plan[0][0]:
            return
        _, rank, drill = self._plan[0]
        if rank in ranks.alive:
            self._plan.pop(0)
            self._tell(events.DrillFired(spec=drill.spec, kind="kill", rank=rank))
            ranks.signal(rank, signal.SIGKILL)

    def _look(self) -> None:
        for drill in list(self._at_steps):
            if self._ranks is not None and self._due(drill, self._ranks):
                self._at_steps.remove(drill)
                self._fire(drill, self._ranks)
        if not self._at_steps:
            self._loop.cancel(self._look)

    def _due(self, drill: Drill, ranks: Ranks) -> bool:
        rank = drill.rank or 0
        if rank not in ranks.alive:
            return False
        if drill.kind == "corrupt" and len(self._store.committed()) < 2:
            return False  # without an older checkpoint there would be nothing to fall back to
        # The rank itself looks at the end of each step, so an exit is asked for one step ahead.
        ahead = 1 if drill.kind == "exit" else 0
        return ranks.beats()[rank].step >= (drill.step or 1) - ahead

    def _fire(self, drill: Drill, ranks: Ranks) -> None:
        rank = drill.rank or 0
        target = self._store.latest() if drill.kind == "corrupt" else None
        self._tell(
            events.DrillFired(
                spec=drill.spec,
                kind=drill.kind,
                rank=rank,
                step=drill.step,
                target=target.name if target else None,
            )
        )
        if drill.kind == "stop":
            ranks.signal(rank, signal.SIGSTOP)
        elif drill.kind == "exit":
            assert self._change is not None
            self._change(
                lambda control: replace(
                    control, exit_rank=rank, exit_at=drill.step or 1, exit_code=drill.code
                )
            )
        else:
            if target is not None:
                # Of its packs, which may be empty where nothing has changed, or its documents; what
                # savers have there for a while may be gone in a moment.
                stay = [f for f in target.iterdir() if not f.name.startswith(files.TEMPORARY)]
                flip_a_bit(max(stay, key=lambda file: file.stat().st_size))
            ranks.signal(rank, signal.SIGKILL)


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file, and put its modification time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _plan(drills: Sequence[Drill], world_size: int) -> list[tuple[float, int, Drill]]:
    plan = []
    for drill in drills:
        at = time.monotonic()
        for wait, rank in moments(drill, world_size):
            at += wait
            plan.append((at, rank, drill))
    return sorted(plan, key=lambda entry: entry[:2])
