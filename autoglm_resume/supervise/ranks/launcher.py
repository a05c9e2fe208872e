"""Starting a worker group: forked from a zygote, cold where that cannot be, or by torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ASSIGNMENT, Assignment, Source
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.base.machine import free_port
from autoglm_resume.supervise.base.spawn import HOME
from autoglm_resume.supervise.ranks.group import Group, end_orphans
from autoglm_resume.supervise.ranks.spares import Spares
from autoglm_resume.supervise.ranks.zygote import State, StoreProcess, Zygote

AGENT = -1
"""Key of the torchrun process itself in a group."""

_TIED = """
import runpy, sys
from autoglm_resume import linux
linux.die_with_parent(int(sys.argv.pop(1)))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""`python -m` that ends with its parent: torchrun would train on after its kill -9. The child does
this itself, as no Python may run between the fork and the exec of a process with threads."""
_EXIT_LINE = re.compile(r"exitcode\s*:\s*(-?\d+)\s*\(pid:\s*(\d+)\)")


class Endpoint(NamedTuple):
    """Where the ranks of an attempt meet."""

    port: int
    served: bool
    """Whether a store listens there already; otherwise rank 0 has to open one."""


class StartUp(NamedTuple):
    """What a rank did to come to its first step."""

    modules: Sequence[str]
    """Installed ones that it imported."""
    own: Sequence[str] = ()
    """The project's own."""
    staged: bool = False
    """Whether the script is split (`autoglm.launch`)."""


class Launcher(Protocol):
    """How ranks come to be."""

    def rendezvous(self, fixed: int | None, cancelled: Callable[[], bool]) -> Endpoint:
        """A fresh place to meet, at port `fixed` if there is one.

        Raises UsageError that names who has the fixed port.
        """
        ...

    def start(self, assignment: Assignment, group: Group, cancelled: Callable[[], bool]) -> None:
        """Start every rank into `group`, unless `cancelled` turns true first."""
        ...

    def learn(self, seen: StartUp) -> None:
        """The script was seen to do this: have it ready for the next attempt."""
        ...

    def ended(self) -> None:
        """The ranks are down; after this, `own` names every process there is."""
        ...

    def own(self) -> frozenset[int]:
        """Pids of processes that belong to the launcher and outlive an attempt."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class Warm:
    """Forks of a zygote; a cold start whenever there is none that can fork."""

    LOSSES = 3
    """A zygote lost this often is not tried again: something in its modules does not agree."""
    PATIENCE = 120.0
    """Seconds for a zygote's imports, after which a cold start is tried."""

    def __init__(
        self,
        loop: EventLoop,
        environment: Mapping[str, str],
        modules: Sequence[str],
        log: Path,
        tell: Callable[..., object],
        others: Callable[[], frozenset[int]],
        source: Source,
        spares: int = 0,
    ) -> None:
        """`others` are children of this process that are no ranks either; `source` is what spares,
        if any, prepare themselves for.
        """
        self._loop = loop
        self._others = others
        self._environment = environment
        self._modules = list(modules)
        self._log = log
        self._tell = tell
        self._losses = 0
        self._fixed: int | None = None
        self._cold: list[subprocess.Popen[bytes]] = []
        self._stores: list[StoreProcess] = []
        self._serving: list[StoreProcess] = []
        """Of the present attempt, and of earlier ones that are not reaped yet."""
        self._source = source
        self._seen = StartUp(())
        self._spares = Spares(loop, spares, self._raise_spare, tell)
        self._zygote: Zygote | None = self._spawn()

    def rendezvous(self, fixed: int | None, cancelled: Callable[[], bool]) -> Endpoint:
        """A store of its own per attempt, opened ahead of time.

        With the store in rank 0, as torch does it by itself, the other ranks come too early in
        two starts of five, and try again after 0.4 to 0.7 s.
        """
        self._settle(cancelled)
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
        if not self._stores and self._zygote is not None and not cancelled():
            self._zygote.open_store(fixed or 0)
            self._settle(cancelled)
        if self._stores:
            self._serving.append(self._stores.pop(0))
            return Endpoint(self._serving[-1].port, served=True)
        return Endpoint(free_port(fixed), served=False)

    def start(self, assignment: Assignment, group: Group, cancelled: Callable[[], bool]) -> None:
        ranks = range(assignment.world_size)
        self._settle(cancelled)
        if cancelled():
            return
        warmest = self._spares.take(assignment.path, ranks)
        rest = [rank for rank in ranks if rank not in warmest]
        pids = self._zygote.fork(assignment.path, rest) if self._zygote and rest else None
        if not rest:
            pids = {}
        if pids is None:
            self._tell("cold_start", reason="there is no zygote to fork from")
            # Ranks that a zygote forked but did not live to report.
            end_orphans(self.own() | self._others() | frozenset(warmest.values()))
            pids = {rank: self._exec(assignment, rank) for rank in rest}
        else:
            self._losses = 0
        for rank, pid in {**warmest, **pids}.items():
            group.add(rank, pid)
        if self._zygote is not None:
            self._zygote.note(group.pids.values())

    def learn(self, seen: StartUp) -> None:
        self._seen = seen
        new = [name for name in seen.modules if name not in self._modules]
        self._modules += new
        if self._zygote is not None and new:
            self._zygote.preload(new)
        if self._zygote is not None and not self._stores and self._fixed is None:
            self._zygote.open_store(0)
        if self._zygote is not None:
            self._spares.fill()

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

    def _settle(self, cancelled: Callable[[], bool]) -> None:
        """Wait until there is a zygote that can fork, or none."""

        def settled() -> bool:
            return cancelled() or self._zygote is None or self._zygote.state is State.READY

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
            self._modules.remove(unfit)
        elif unfit is not None or self._losses >= self.LOSSES:
            self._zygote = None
            return
        self._zygote = self._spawn()

    def _exec(self, assignment: Assignment, rank: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-m", "autoglm_resume.worker.rank"],
            cwd=HOME,
            env={**self._environment, **assignment.rank_environment(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Kept: a Popen that is thrown away reaps the process behind the group's back.
        self._cold.append(process)
        return process.pid


def _lives(store: StoreProcess) -> bool:
    """Whether it still serves; reaps it if not."""
    try:
        return os.waitpid(store.pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


class Torchrun:
    """The real torchrun, one command per attempt.

    Its own restarts stay off: they would pass by the gate, and torch 2.13 reuses one store for
    all of them, on which 8 of 10 restarts hung when tried (pytorch#135712 is the NCCL report).
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def rendezvous(self, fixed: int | None, cancelled: Callable[[], bool]) -> Endpoint:
        return Endpoint(free_port(fixed), served=True)

    def start(self, assignment: Assignment, group: Group, cancelled: Callable[[], bool]) -> None:
        if cancelled():
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

    def ended(self) -> None:
        """Nothing is left."""

    def own(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        """Nothing outlives an attempt."""


def made_for(
    job: Job,
    source: Source,
    environment: Mapping[str, str],
    loop: EventLoop,
    imports: Sequence[str],
    log: Path,
    tell: Callable[..., object],
    others: Callable[[], frozenset[int]],
) -> Launcher:
    """The launcher that `job` asks for; see `Warm` for the rest."""
    if job.launcher == "torchrun":
        return Torchrun(environment)
    modules = [*job.preload, *imports]
    return Warm(loop, environment, modules, log, tell, others, source, job.spares)


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
