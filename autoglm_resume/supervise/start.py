"""Starting a run: new, continued, or only planned."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_resume.checkpoint.gate import Verdict
from autoglm_resume.errors import AutoglmError
from autoglm_resume.job.load import from_snapshot
from autoglm_resume.job.spec import Job, dump
from autoglm_resume.observe.live import Screen
from autoglm_resume.supervise import drill, history
from autoglm_resume.supervise.gatekeeper import Gatekeeper
from autoglm_resume.supervise.launcher import Endpoint, torchrun_command
from autoglm_resume.supervise.node import check_directory
from autoglm_resume.supervise.rundir import RunDirectory, locked_checkpoints
from autoglm_resume.supervise.supervisor import Supervisor, assignment, environment, world_size
from autoglm_resume.worker.contract import ASSIGNMENT


@dataclass(frozen=True)
class Plan:
    """What a start would do; nothing was started or changed."""

    job: dict[str, Any]
    command: list[str]
    """Of rank 0; a warm rank is forked and then does exactly this."""
    environment: dict[str, str]
    """Of rank 0, beyond what it inherits."""
    verdicts: tuple[Verdict, ...]
    resume: str | None
    step: int


def start(job: Job, screen: Screen, fresh: bool = False, drills: Sequence[str] = ()) -> int:
    """Begin the run of `job`, or continue it if it was begun; returns the exit code.

    `fresh` sets an earlier run of the same name aside first. Raises AutoglmError.
    """
    ordered = drill.parse(drills, world_size(job))
    run = RunDirectory(Path(job.run_dir))
    if fresh and run.exists:
        with run.locked():
            _set_aside(run.path)
            _set_aside(Path(job.checkpoint.dir))
    with ExitStack() as held:
        lock = held.enter_context(run.locked())
        checkpoints = Path(job.checkpoint.dir)
        past = history.recall(run.events())
        if past.finished:
            screen.note(
                f"{run.path}: this run is finished at step {past.checkpointed}; "
                "`autoglm run --fresh` begins a new one and keeps this one's files"
            )
            return 0
        if past.run_id is not None:
            screen.note(f"{run.path}: continuing the run (attempt {past.attempts})")
        check_directory(checkpoints, job.guards.free_disk)
        if not checkpoints.is_relative_to(run.path):
            held.enter_context(locked_checkpoints(checkpoints))
        run.save_job(dump(job))
        return Supervisor(run, lock, job, ordered, screen).run()


def resume(directory: Path, screen: Screen) -> int:
    """Continue a run from its directory alone, or say that it is finished. Idempotent."""
    return start(from_snapshot(RunDirectory(directory).job()), screen)


def plan(job: Job) -> Plan:
    """What `start` would do now."""
    run = RunDirectory(Path(job.run_dir))
    past = history.recall(run.events())
    keeper = Gatekeeper(job, world_size(job), lambda *_, **__: None, past.model)
    choice = keeper.judge(every=True)
    accepted = choice.accepted
    task = assignment(job, run, past.run_id or "new", past.attempts, Endpoint(0, True), None, "")
    ranks = {
        **{k: v for k, v in environment(job).items() if k in job.env or k == "OMP_NUM_THREADS"},
        **task.rank_environment(0),
        "MASTER_PORT": job.env.get("MASTER_PORT", "(a free port, chosen at every start)"),
        ASSIGNMENT: str(task.path),
    }
    return Plan(
        dump(job),
        torchrun_command(task) if job.launcher == "torchrun" else _command(job),
        ranks,
        choice.verdicts,
        accepted.id if accepted else None,
        accepted.step if accepted else 0,
    )


def _command(job: Job) -> list[str]:
    what = ["-m", str(job.module)] if job.module else [str(job.script)]
    return [sys.executable, *what, *job.args]


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}~{number}")
        if not aside.exists():
            break
    try:
        shutil.move(path, aside)
    except OSError as error:
        raise AutoglmError(
            f"{path}: could not be set aside as {shlex.quote(str(aside))}: {error.strerror}"
        ) from error
