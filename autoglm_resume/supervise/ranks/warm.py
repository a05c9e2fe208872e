"""Ranks that are forked from a process which has torch and the script's modules imported."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from autoglm_resume import events
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ALWAYS, Assignment, Endpoint
from autoglm_resume.supervise.base.assign import source
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.base.machine import free_port
from autoglm_resume.supervise.core.history import before
from autoglm_resume.supervise.ranks.cold import Cold
from autoglm_resume.supervise.ranks.group import WorkerGroup, end_orphans
from autoglm_resume.supervise.ranks.launcher import KnownImports, Preview, StartUp
from autoglm_resume.supervise.ranks.spares import Spares
from autoglm_resume.supervise.ranks.zygote import StoreProcess, Zygote, ZygoteState


class Warm:
    """Forks of a zygote; a cold start whenever there is none that can fork."""

    LOSSES = 3
    """A zygote lost this often is not tried again: something in its modules does not agree."""
    PATIENCE = 120.0
    """Seconds for a zygote's imports, after which a cold start is tried."""

    def __init__(
        self, context: RunContext, imports: KnownImports, others: Callable[[], frozenset[int]]
    ) -> None:
        job = context.job
        self._loop = context.loop
        self._others = others
        self._environment = context.environment
        self._modules = [*job.preload, *imports.modules]
        self._complete = imports.end
        """Whether nothing more is imported ahead."""
        self._log = context.run.path / "zygote.log"
        self._tell = context.tell
        self._stops = context.stops
        self._losses = 0
        self._fixed: int | None = None
        self._cold = Cold(context, imports, others)
        self._stores: list[StoreProcess] = []
        self._serving: list[StoreProcess] = []
        """Of the present attempt, and of earlier ones that are not reaped yet."""
        self._source = source(job)
        """What spares, if any, prepare themselves for."""
        self._seen = StartUp(())
        self._spares = Spares(self._loop, job.spares, self._raise_spare, self._tell)
        self._zygote: Zygote | None = self._spawn()

    @classmethod
    def preview(cls, job: Job, assignment: Assignment) -> Preview:
        return Cold.preview(job, assignment)

    def rendezvous(self, fixed: int | None) -> Endpoint:
        """A store of its own per attempt, opened ahead of time.

        With the store in rank 0, as torch does it by itself, the other ranks come too early in
        two starts of five, and try again after 0.4 to 0.7 s.
        """
        self._settle()
        self._stores = [store for store in self._stores if _lives(store)]
        self._serving = [store for store in self._serving if _lives(store)]
        for store in self._serving:
            os.kill(store.pid, signal.SIGKILL)  # reaped later: its end takes 15 ms
        self._fixed = fixed
        if fixed is not None:
            for store in self._serving:
                os.waitpid(store.pid, 0)  # but not later than the port is needed again
            self._serving.clear()
            free_port(fixed)
        if not self._stores and self._zygote is not None and not self._stops:
            self._zygote.open_store(fixed or 0)
            self._settle()
        if self._stores:
            self._serving.append(self._stores.pop(0))
            return Endpoint(self._serving[-1].port, served=True)
        return Endpoint(free_port(fixed), served=False)

    def start(self, assignment: Assignment, group: WorkerGroup) -> None:
        ranks = range(assignment.world_size)
        self._settle()
        if self._stops:
            return
        warmest = self._spares.take(assignment.path, ranks)
        rest = [rank for rank in ranks if rank not in warmest]
        pids = self._zygote.fork(assignment.path, rest) if self._zygote and rest else None
        if not rest:
            pids = {}
        if pids is None:
            self._tell(events.ColdStart(reason="there is no zygote to fork from"))
            # Ranks that a zygote forked but did not live to report.
            end_orphans(self.own() | self._others() | frozenset(warmest.values()))
            pids = self._cold.spawn(assignment, rest)
        else:
            self._losses = 0
        for rank, pid in {**warmest, **pids}.items():
            group.add(rank, pid)
        if self._zygote is not None:
            self._zygote.note(group.pids.values())

    def learn(self, seen: StartUp) -> None:
        self._seen = seen
        known = {*self._modules, *(seen.modules if self._complete else ())}
        new = [name for name in seen.modules if name not in known]
        self._modules += new
        if self._zygote is not None and new:
            self._zygote.preload(new)
        if self._zygote is not None and not self._stores and self._fixed is None:
            self._zygote.open_store(0)
        if self._zygote is not None:
            self._spares.fill()

    def unlearn(self, module: str) -> None:
        if module in self._modules:
            self._end_before(module)
            if self._zygote is not None:
                self._spares.forget_expected()
                self._zygote.close()
                self._zygote = self._spawn()
        elif module in ALWAYS and self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def ended(self) -> None:
        if self._zygote is not None:
            self._zygote.settle()
        if self._zygote is not None:  # it may have ended meanwhile
            self._zygote.note(())

    def own(self) -> frozenset[int]:
        zygote = [self._zygote.pid] if self._zygote is not None else []
        self._serving = [store for store in self._serving if _lives(store)]
        stores = (store.pid for store in (*self._stores, *self._serving))
        return frozenset([*zygote, *stores]) | self._spares.pids

    def close(self) -> None:
        self._spares.close()
        if self._zygote is not None:
            self._zygote.close()

    def _settle(self) -> None:
        """Wait until there is a zygote that can fork, or none."""

        def settled() -> bool:
            return (
                bool(self._stops) or self._zygote is None or self._zygote.state is ZygoteState.READY
            )

        if not self._loop.wait(settled, time.monotonic() + self.PATIENCE) and self._zygote:
            self._zygote.give_up(f"it was silent for {self.PATIENCE:.0f} s")

    def _spawn(self) -> Zygote:
        return Zygote(
            self._loop,
            self._environment,
            self._modules,
            self._log,
            tell=self._tell,
            lost=self._replace,
            opened=lambda store: self._stores.append(store),
            spared=self._spares.add,
        )

    def _raise_spare(self) -> None:
        assert self._zygote is not None
        seen, log = self._seen, self._log.with_name("spares.log")
        self._zygote.spare(self._source, seen.own, log, split=seen.staged)

    def _replace(self) -> None:
        """The zygote is gone: raise another at once, so that the next restart is warm again."""
        if self._zygote is None:
            return
        self._losses += 1
        self._spares.forget_expected()
        unfit = self._zygote.unfit_module
        if unfit in self._modules:
            self._end_before(unfit)
        elif unfit is not None or self._losses >= self.LOSSES:
            self._zygote = None
            return
        self._zygote = self._spawn()

    def _end_before(self, module: str) -> None:
        self._modules = list(before(module, self._modules))
        self._complete = True


def _lives(store: StoreProcess) -> bool:
    """Whether it still serves; reaps it if not."""
    try:
        return os.waitpid(store.pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
