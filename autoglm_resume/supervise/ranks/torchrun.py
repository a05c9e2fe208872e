"""Ranks below the real torchrun, one command per attempt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ASSIGNMENT, HOME, Assignment, Endpoint
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.base.machine import free_port
from autoglm_resume.supervise.ranks.group import AGENT, WorkerGroup
from autoglm_resume.supervise.ranks.launcher import KnownImports, Preview, StartUp

_TIED = """
import runpy, sys
from autoglm_resume import linux
linux.die_with_parent(int(sys.argv.pop(1)))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""`python -m` that ends with its parent: torchrun would train on after its kill -9. The child does
this itself, as no Python may run between the fork and the exec of a process with threads."""
_EXIT_LINE = re.compile(r"exitcode\s*:\s*(-?\d+)\s*\(pid:\s*(\d+)\)")


class Torchrun:
    """The real torchrun, one command per attempt.

    Its own restarts stay off: they would pass by the gate, and torch 2.13 reuses one store for
    all of them, on which 8 of 10 restarts hung when tried (pytorch#135712 is the NCCL report).
    """

    def __init__(
        self, context: RunContext, imports: KnownImports, others: Callable[[], frozenset[int]]
    ) -> None:
        self._environment = context.environment
        self._stops = context.stops
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def preview(cls, job: Job, assignment: Assignment) -> Preview:
        return Preview(torchrun_command(assignment), {**job.env, ASSIGNMENT: str(assignment.path)})

    def rendezvous(self, fixed: int | None) -> Endpoint:
        return Endpoint(free_port(fixed), served=True)

    def start(self, assignment: Assignment, group: WorkerGroup) -> None:
        if self._stops:
            return
        with torchrun_log(assignment).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), *torchrun_command(assignment)[2:]],
                cwd=HOME,
                env={
                    **self._environment,
                    **assignment.environment,
                    ASSIGNMENT: str(assignment.path),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        group.add(AGENT, process.pid)

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


def torchrun_command(assignment: Assignment) -> list[str]:
    """One attempt as a torchrun command; the ranks find the script through the assignment."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1", f"--nproc-per-node={assignment.world_size}", "--max-restarts=0"),
        *(f"--master-addr={assignment.master_addr}", f"--master-port={assignment.master_port}"),
        *("-m", "autoglm_resume.worker.rank", "--under-torchrun"),
    ]


def torchrun_log(assignment: Assignment) -> Path:
    """What torchrun itself says."""
    return Path(assignment.directory) / "torchrun.log"


def torchrun_exits(assignment: Assignment) -> dict[int, int]:
    """Exit codes by pid, negative for signals, from torchrun's report of a failure."""
    try:
        text = torchrun_log(assignment).read_text(errors="replace")
    except OSError:
        return {}
    return {int(pid): int(code) for code, pid in _EXIT_LINE.findall(text)}
