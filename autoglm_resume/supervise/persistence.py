"""The processes that keep what the ranks of a run make, savers and replicator, as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from autoglm_resume import events
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.events import Event
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.core.history import History
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.supervise.services.replicator import FLUSH_SECONDS, Replicator
from autoglm_resume.supervise.services.savers import Savers

COMMIT_SECONDS = 60.0
"""To wait, at the end, for replicas that the last checkpoint must be in to count."""


class Persistence:
    """Savers, which outlive the ranks of an attempt, and the replicator. `close` ends them."""

    def __init__(
        self,
        context: RunContext,
        run_id: str,
        gate: RunGate,
        past: History,
        hear: Callable[[int, Event], None],
    ) -> None:
        """`hear` gets what a saver says of the saves of a rank."""
        loop, environment, tell = context.loop, context.environment, context.tell
        directory = context.run.path
        self._job = job = context.job
        self._gate = gate
        self._stops = context.stops
        self._tell = tell
        self._savers: Savers | None = None
        if job.checkpoint.memory:
            log = directory / "savers.log"
            self._savers = Savers(loop, environment, run_id, context.world_size, log, tell, hear)
        self._replicas = Replicator(
            loop,
            environment,
            gate.store.root,
            run_id,
            job.checkpoint.replicas,
            job.checkpoint.commit,
            directory / "replicator.log",
            self._replica_said,
            past.replicated,
            lambda: gate.branches,
        )
        if job.checkpoint.replicas:
            gate.repair_with(self._repair)
        self._replicas.start()
        self.protect()

    @property
    def pids(self) -> frozenset[int]:
        """Of the processes: they are no ranks, and nothing that a rank left behind."""
        savers = self._savers.pids if self._savers else frozenset()
        return savers | self._replicas.pids

    @property
    def names(self) -> tuple[str, ...]:
        """Where each rank finds its saver; none if training itself waits for the disk."""
        return self._savers.names if self._savers else ()

    def settle(self, from_memory: Callable[[str], bool] = lambda id: False) -> Sealed | None:
        """Have what the ranks left in memory on storage, or what may be taken `from_memory`."""
        if self._savers is None:
            return None
        timeout = self._job.checkpoint.timeout
        return self._savers.settle(self._gate.store, timeout, self._stops.hurried, from_memory)

    def work_on(self) -> None:
        """The ranks train: nothing is in the savers' way any more."""
        if self._savers is not None:
            self._savers.work_on()

    def notice(self) -> None:
        """Checkpoints came or went."""
        self._replicas.notice()

    def flush(self) -> None:
        """At the end: copy what is left, and say so if the last checkpoint does not count."""
        policy = self._job.checkpoint.commit
        patience = FLUSH_SECONDS if policy == "local" else COMMIT_SECONDS
        self._replicas.flush(0.0 if self._stops.hurried() else patience)
        newest = self._gate.store.latest()
        if newest is not None and not self._replicas.counts(newest.name):
            text = (
                f"{newest.name} is here, but not in enough replicas (checkpoint.commit: {policy})"
            )
            self._tell(events.WarningGiven(text=text))

    def close(self, *, settled: bool) -> None:
        """End them, once what was under way is on storage unless it is `settled`, or given up."""
        if self._savers is not None:
            with contextlib.suppress(OSError):
                if not settled:
                    self.settle()
            self._savers.close()
        self._replicas.close()

    def _replica_said(self, event: Event, /) -> None:
        self._tell(event)
        if isinstance(event, events.Replicated):
            self.protect()

    def protect(self) -> None:
        """Retention must keep the newest checkpoint that counts by the job's commit policy."""
        if self._savers is not None:
            self._savers.protect(self._replicas.protected(self._gate.present()))

    def _repair(self, id: str, digest: str | None) -> list[str]:
        return self._replicas.repair(id, digest, self._stops.asked)
