"""Asking a machine whether it is fit for a job, before every start of its ranks.

What costs more than a millisecond is only asked when a supervisor begins.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from autoglm_resume import events, files, journal, linux
from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, UsageError
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.protocol.shared_memory import room
from autoglm_resume.supervise.base.assign import environment, world_size
from autoglm_resume.supervise.base.gpu_exclusion import VISIBLE
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.checks import GpuFacts, MachineCheck, MachineFacts, Needs, judge
from autoglm_resume.supervise.preflight import collective_round, gpu_probe, leftovers
from autoglm_resume.supervise.preflight.storage_probe import StorageProbe

_TAIL = 65536
DRIVER_SECONDS = 10.0
"""For the GPUs' driver to answer, from when the first attempt is ready to start."""


class Preflight:
    """The checks of one life of a supervisor. `tell` gets a `warning` for what is not refused."""

    def __init__(self, run: RunDirectory, job: Job, tell: events.Tell) -> None:
        self._run = run
        self._job = job
        self._tell = tell
        self._written = last_written(run.journal)
        self._warned: set[str] = set()
        self._started = False
        self._reach: StorageProbe | None = None
        # The driver's first answer takes up to seconds, and one that is stuck gives none.
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looked: tuple[GpuFacts, ...] | None = None
        self._driver = ""

    @property
    def pids(self) -> frozenset[int]:
        """Of children that hang with a dead mount."""
        return self._reach.pids if self._reach else frozenset()

    def begin(self) -> None:
        """Before anything is started: end leftovers, and ask everything that takes a while.

        Raises UsageError for what a strict guard finds.
        """
        guards, env = self._job.guards, environment(self._job)
        replicas = [each for each in self._job.checkpoint.replicas if each.startswith("/")]
        # One that is strict was asked before anything else.
        storage = [str(self._job.checkpoint.dir)] if guards.storage == "lenient" else []
        self._reach = StorageProbe(storage, replicas)
        facts = MachineFacts(leftovers=self._end_leftovers(), shm=shared_memory())
        if guards.gpus != "off" or guards.gpu_memory != "off":
            self._looking.start()
        if guards.collective != "off":
            facts = replace(facts, collective=collective_round.run(world_size(self._job), env))
        facts = replace(facts, places=self._reach.answers())
        self._act(judge(facts, Needs(world_size(self._job))), refuse=True)

    def before(self, store: Store, resume: ResumePoint | None) -> None:
        """Before an attempt that begins with `resume`.

        Raises UsageError for what a strict guard finds before the first one. Later ones only warn:
        the run has come further than a refusal would bring it.
        """
        first, self._started = not self._started, True
        facts = MachineFacts(now=time.time(), disk=free(store.root))
        if first:  # later the snapshots are in memory already
            facts = replace(facts, memory=room(), gpus=self._gpus(), driver=self._driver)
        self._act(judge(facts, needs(self._job, store, resume, self._written)), refuse=first)

    def _look(self) -> None:
        self._looked, self._driver = gpu_probe.look(
            lambda pid: leftovers.belongs(pid, self._run.path), environment(self._job).get(VISIBLE)
        )

    def _gpus(self) -> tuple[GpuFacts, ...] | None:
        """What the driver said meanwhile."""
        if self._looking.ident is None:  # nobody wants to know
            return None
        self._looking.join(DRIVER_SECONDS)
        if self._looking.is_alive():
            return (GpuFacts("driver", f"no answer within {DRIVER_SECONDS:.0f} s"),)
        return self._looked

    def _end_leftovers(self) -> tuple[str, ...]:
        found = leftovers.find(self._run.path)
        names = {process.pid: leftovers.described(process) for process in found}
        left = leftovers.end(found, self._run.path)
        if names:
            text = f"an earlier supervisor left behind, now ended: {', '.join(names.values())}"
            self._tell(events.WarningGiven(text=text))
        return tuple(names[process.pid] for process in left)

    def _act(self, checks: Iterable[MachineCheck], *, refuse: bool) -> None:
        for check in checks:
            strictness = getattr(self._job.guards, check.guard) if check.guard else "lenient"
            if check.ok is not False or strictness == "off":
                self._warned.discard(check.name)
                continue
            if strictness == "strict" and refuse:
                raise refusal(check)
            if check.name not in self._warned:
                self._warned.add(check.name)
                self._tell(events.WarningGiven(text=f"{sentence(check)}; {check.hint}"))


def require_storage(job: Job) -> None:
    """Before anything touches the checkpoint directory, which may be a mount that hangs.

    Raises UsageError if it does not answer and `guards.storage` is strict.
    """
    if job.guards.storage == "strict":
        places = StorageProbe([str(job.checkpoint.dir)]).answers()
        if places[0].hung:  # what else may be wrong with it is said better by who uses it
            raise refusal(judge(MachineFacts(places=places), Needs(1))[0])


def refusal(check: MachineCheck) -> UsageError:
    """Of what a strict guard found."""
    return UsageError(
        f"guards.{check.guard}: {sentence(check)}",
        hint=f"{check.hint}; or set guards.{check.guard}: lenient",
    )


def sentence(check: MachineCheck) -> str:
    """What was expected, and what was found."""
    return f"{check.name}: expected {check.expected}, found {check.found}"


def needs(
    job: Job, store: Store, resume: ResumePoint | None = None, written: float | None = None
) -> Needs:
    """What the job needs, as far as the checkpoint it goes on from tells."""
    manifest = _manifest(store, resume.id if resume else None)
    created = manifest.created if manifest else None
    known = [at for at in (written, created) if at is not None]
    port = job.env.get("MASTER_PORT")
    return Needs(
        ranks=world_size(job),
        slots=job.checkpoint.memory,
        snapshot=manifest.raw if manifest else None,
        stored=manifest.stored if manifest else None,
        keep=job.checkpoint.keep.rules.last,
        present=len(store.committed()) if manifest else 0,
        free_disk=job.guards.free_disk,
        port=int(port) if port else None,
        written=max(known, default=None),
    )


def last_written(path: Path) -> float | None:
    """Unix seconds of the latest event at the end of a journal, which may be followed by earlier
    ones: this command itself has written since by a clock that it is to judge.
    """
    try:
        with files.reading(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            times = [event.time for event in journal.decode(file.read())]
    except OSError:
        return None
    return max((at for at in times if at is not None), default=None)


def shared_memory() -> int | None:
    """Bytes free in /dev/shm, None without it."""
    return free(Path("/dev/shm"))


def free(path: Path) -> int | None:
    """Bytes that this user may still write at `path`, or where it will be made."""
    try:
        return linux.free_bytes(path)
    except OSError:
        return None


def _manifest(store: Store, id: str | None) -> Manifest | None:
    """Of checkpoint `id`, or of the newest. None if there is none that can be read."""
    with contextlib.suppress(CheckpointError, OSError):
        path = store.latest() if id is None else store.directory(id)
        return store.load_manifest(path) if path else None
    return None
