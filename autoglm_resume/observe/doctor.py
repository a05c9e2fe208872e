"""Every check of a machine, by hand: what was found, whether that will do, what to do about it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import UsageError
from autoglm_resume.job.spec import Guards, Job
from autoglm_resume.observe.tables import Table, width
from autoglm_resume.protocol.shared_memory import room
from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.base.assign import environment, world_size
from autoglm_resume.supervise.base.gpu_exclusion import VISIBLE, without
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.checks import (
    MachineCheck,
    MachineFacts,
    Needs,
    judge,
    judge_system,
)
from autoglm_resume.supervise.core.history import recall
from autoglm_resume.supervise.preflight import (
    collective_round,
    gpu_probe,
    leftovers,
    preflight,
    system,
)
from autoglm_resume.supervise.preflight.storage_probe import StorageProbe

Verdict = Literal["ok", "warning", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """A check and how serious it is for this job."""

    check: MachineCheck
    verdict: Verdict


def examine(job: Job | None) -> list[Finding]:
    """All checks, the small collective round included; some seconds. Without a job: of this
    directory and the defaults.
    """
    guards = job.guards if job else Guards()
    home = Path(job.checkpoint.dir) if job else Path.cwd()
    replicas = job.checkpoint.replicas if job else ()
    places = StorageProbe([str(home)], replicas, _environment(job)).answers()
    answers = not places[0].hung
    run = RunDirectory(Path(job.run_dir)) if job and answers else None
    if job is not None and run is not None:
        job = without(job, recall(run.events()).excluded)
    env = _environment(job)
    checks = list(judge_system(system.look(env)))
    looked, driver = gpu_probe.look(
        lambda pid: run is not None and run.exists and leftovers.belongs(pid, run.path),
        env.get(VISIBLE),
    )
    # While a supervisor has the run, what is there is its own.
    running = run is not None and run.holder() is not None
    ranks = world_size(job) if job is not None else max(2, len(looked or ()))
    needed, disk = Needs(ranks), None
    if answers:
        disk = preflight.free(home)
        if job is not None and run is not None:
            needed = preflight.needs(job, Store(home), None, preflight.last_written(run.journal))
    facts = MachineFacts(
        now=time.time(),
        gpus=looked,
        driver=driver,
        memory=room(),
        shm=preflight.shared_memory(),
        disk=disk,
        port_owner=None if needed.port is None or running else _owner(needed.port),
        places=places,
        leftovers=None if run is None or not run.exists or running else _leftovers(run),
        collective=collective_round.run(ranks, env),
    )
    checks += judge(facts, needed)
    return [Finding(check, verdict(check, guards)) for check in checks]


def code(findings: Sequence[Finding]) -> int:
    """1 if something is wrong, else 0."""
    return int(any(finding.verdict == "wrong" for finding in findings))


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One object per check."""
    return [{**asdict(found.check), "verdict": found.verdict} for found in findings]


def show(findings: Sequence[Finding]) -> None:
    """One line per check, on standard output."""
    table = Table(("what", "found", "verdict", "what to do"))
    for finding in findings:
        check = finding.check
        todo = "" if check.ok else "; ".join(filter(None, (_expected(check), check.hint)))
        style = {"wrong": "red", "warning": "yellow"}.get(finding.verdict, "")
        table.add(check.name, check.found, finding.verdict, todo, style=style)
    columns = width(sys.stdout)
    if columns is not None and not table.fits(columns) and all(f.check.ok for f in findings):
        table = table.only(0, 1, 2)
    table.print(sys.stdout)


def _environment(job: Job | None) -> dict[str, str]:
    return environment(job) if job else dict(os.environ)


def _expected(check: MachineCheck) -> str:
    return f"expected: {check.expected}" if check.expected else ""


def verdict(check: MachineCheck, guards: Guards) -> Verdict:
    """How serious a check is, by the job's switches."""
    if check.ok is None:
        return "unknown"
    if check.ok:
        return "ok"
    if check.refuses:
        return "wrong"
    strictness = getattr(guards, check.guard) if check.guard else "strict"
    # Whoever asks by hand wants the round, which is off before starts only for its time.
    lenient = strictness != "strict" and check.guard != "collective"
    return "warning" if lenient or check.name.startswith("replica ") else "wrong"


def _owner(port: int) -> str:
    try:
        machine.free_port(port)
    except UsageError as error:
        return error.message.partition(", found ")[2].removeprefix("it ")
    return ""


def _leftovers(run: RunDirectory) -> tuple[str, ...]:
    return tuple(map(leftovers.described, leftovers.find(run.path)))
