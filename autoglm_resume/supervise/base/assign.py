"""From a job to what its processes are told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import (
    RUN,
    SUPERVISOR,
    Assignment,
    Beginning,
    Checkpointing,
    Endpoint,
    ResumePoint,
    Source,
    shared_environment,
)
from autoglm_resume.protocol.loss_guard import Bounds
from autoglm_resume.supervise.base.machine import visible_gpus
from autoglm_resume.supervise.base.run_directory import RunDirectory

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""For large tensors (torch: c10/core/impl/alloc_cpu.cpp): ranks are filled and torn down sooner."""
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where compilers keep what they made: with the run, so that no restart compiles it again."""


def world_size(job: Job) -> int:
    """Ranks of a job on this machine."""
    asked = job.nproc_per_node
    return max(1, visible_gpus()) if asked == "auto" else asked


def environment(job: Job) -> dict[str, str]:
    """What every process of the job inherits."""
    said = _absolute(os.environ, Path.cwd())
    caches = {name: str(Path(job.run_dir) / "cache" / at) for name, at in CACHES.items()}
    inherited = {
        **caches,
        **HUGE_PAGES,
        **said,
        **shared_environment(world_size(job)),
        **_of_job(job),
    }
    return {**inherited, RUN: str(job.run_dir), SUPERVISOR: str(os.getpid())}


def _of_job(job: Job) -> dict[str, str]:
    return _absolute(job.env, Path(job.workdir))


def _absolute(environment: Mapping[str, str], base: Path) -> dict[str, str]:
    """With the places of PYTHONPATH as they are seen from `base`: no process of ours begins there,
    and Python makes them absolute where it begins.
    """
    found = dict(environment)
    if "PYTHONPATH" in found:
        places = (str(base / place) for place in found["PYTHONPATH"].split(os.pathsep))
        found["PYTHONPATH"] = os.pathsep.join(places)
    return found


def source(job: Job) -> Source:
    """What to run."""
    script = str(job.script) if job.script else None
    return Source(script, job.module, tuple(job.args), str(job.workdir))


def checkpointing(
    job: Job, branches: tuple[Branch, ...] = (), skip: tuple[str, ...] = ()
) -> Checkpointing:
    """What a rank and its saver need to know of the job's `checkpoint`."""
    asked = job.checkpoint
    return Checkpointing(
        dir=str(asked.dir),
        every_steps=asked.every.steps,
        keep=asked.keep.rules,
        memory=asked.memory,
        on_busy=asked.on_busy,
        on_error=asked.on_error,
        options=SaveOptions(asked.compress, asked.keyframe_every, asked.timeout),
        rename=dict(asked.rename),
        strict=asked.strict,
        skip=skip,
        branches=branches,
    )


def assignment(
    job: Job,
    run: RunDirectory,
    run_id: str,
    number: int,
    endpoint: Endpoint,
    resume: ResumePoint | None,
    board: str,
    savers: tuple[str, ...] = (),
    branches: tuple[Branch, ...] = (),
    skip: tuple[str, ...] = (),
    begins: Beginning | None = None,
) -> Assignment:
    """What the ranks of attempt `number` are told."""
    return Assignment(
        run_id=run_id,
        attempt=number,
        world_size=world_size(job),
        master_addr="127.0.0.1",
        master_port=endpoint.port,
        agent_store=endpoint.served,
        max_restarts=job.restart.max_restarts,
        supervisor=os.getpid(),
        directory=str(run.attempt(number)),
        board=board,
        source=source(job),
        checkpoint=checkpointing(job, branches, skip),
        resume=resume,
        savers=savers,
        check_model=job.guards.model == "strict",
        bounds=Bounds(job.guards.nan_losses, job.guards.loss_spike),
        config_files=tuple(str(path) for path in job.guards.config_files),
        environment=_of_job(job),
        begins=None if resume else begins,
    )
