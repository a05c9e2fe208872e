"""Ranks that each start an interpreter of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable

from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import HOME, Assignment, Endpoint
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.base.machine import free_port
from autoglm_resume.supervise.ranks.group import WorkerGroup
from autoglm_resume.supervise.ranks.launcher import KnownImports, Preview, StartUp


class Cold:
    """One process per rank, with all its imports before it; nothing outlives an attempt."""

    def __init__(
        self, context: RunContext, imports: KnownImports, others: Callable[[], frozenset[int]]
    ) -> None:
        self._environment = context.environment
        self._stops = context.stops
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def preview(cls, job: Job, assignment: Assignment) -> Preview:
        what = ["-m", str(job.module)] if job.module else [str(job.script)]
        ranks = assignment.rank_environment(0)
        if not assignment.master_port:
            ranks["MASTER_PORT"] = "(a free port, chosen at every start)"
        return Preview([sys.executable, *what, *job.args], ranks)

    def rendezvous(self, fixed: int | None) -> Endpoint:
        return Endpoint(free_port(fixed), served=False)

    def start(self, assignment: Assignment, group: WorkerGroup) -> None:
        if not self._stops:
            for rank, pid in self.spawn(assignment, range(assignment.world_size)).items():
                group.add(rank, pid)

    def spawn(self, assignment: Assignment, ranks: Iterable[int]) -> dict[int, int]:
        """Start these ranks; their pids."""
        return {rank: self._exec(assignment, rank) for rank in ranks}

    def learn(self, seen: StartUp) -> None:
        """Nothing is kept between attempts."""

    def unlearn(self, module: str) -> None:
        """Nothing is imported ahead."""

    def ended(self) -> None:
        """Nothing is left."""

    def own(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        """Nothing outlives an attempt."""

    def _exec(self, assignment: Assignment, rank: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_resume.worker.rank"],
            cwd=HOME,
            env={**self._environment, **assignment.rank_environment(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Kept: a Popen that is thrown away reaps the process behind the group's back.
        self._processes.append(process)
        return process.pid
