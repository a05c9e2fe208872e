"""Going on without a rank's GPU: which one it was, and what the job is without it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.base.assign import world_size
from autoglm_resume.supervise.base.machine import visible_devices
from autoglm_resume.supervise.core.history import Exclusion

VISIBLE = "CUDA_VISIBLE_DEVICES"


def can_shrink(job: Job) -> bool:
    """Whether it could go on without one rank's GPU: on a spare one, or with a rank fewer."""
    ranks = world_size(job)
    spare = len(_devices(job)) > ranks
    return spare or (job.guards.world_size == "elastic" and ranks > 1)


def excluding(job: Job, rank: int) -> Exclusion:
    """`rank` as torchrun's convention has it: its GPU is that of its own number."""
    devices = _devices(job)
    gpu = devices[rank] if rank < len(devices) else None
    return Exclusion(socket.gethostname(), rank, gpu)


def without(job: Job, excluded: Sequence[Exclusion]) -> Job:
    """`job` on this machine without what was excluded here; elsewhere GPUs are others."""
    here = [each for each in excluded if each.host == socket.gethostname()]
    devices, ranks = _devices(job), world_size(job)
    bad = {each.gpu for each in here} & set(devices)
    left = [device for device in devices if device not in bad]
    ranks -= sum(each.gpu is None for each in here)
    if not here or (bad and not left):
        return job
    if bad:
        ranks = min(ranks, len(left))
        job = job.model_copy(update={"env": {**job.env, VISIBLE: ",".join(left)}})
    return job.model_copy(update={"nproc_per_node": max(1, ranks)})


def _devices(job: Job) -> list[str]:
    return visible_devices(job.env.get(VISIBLE, os.environ.get(VISIBLE)))
