"""What a session needs to know: from its supervisor or, without one, from the script."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.store.commit import complete, sweep
from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.gate import Expectation, choose
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import NoAcceptableCheckpoint
from autoglm_resume.protocol.assignment import Assignment, Checkpointing, ResumePoint
from autoglm_resume.protocol.loss_guard import Bounds
from autoglm_resume.savers import directory_lock

DEFAULT_SECONDS = 300.0
DEFAULT_KEEP = 3


@dataclass(frozen=True)
class Settings:
    """One rank's view of its attempt."""

    rank: int
    world_size: int
    checkpoint: Checkpointing
    every_seconds: float | None
    check_model: bool
    config_files: tuple[str, ...]
    token: str
    """Tells this attempt's checkpoints from those of other attempts at the same step."""
    resume: ResumePoint | None
    bounds: Bounds = field(default_factory=Bounds)


def supervised(assignment: Assignment) -> Settings:
    """Under autoglm: everything is decided already."""
    return Settings(
        rank=int(os.environ["RANK"]),
        world_size=assignment.world_size,
        checkpoint=assignment.checkpoint,
        every_seconds=None,  # the supervisor asks when it is time, through the board
        check_model=assignment.check_model,
        config_files=assignment.config_files,
        token=f"a{assignment.attempt}",
        resume=assignment.resume,
        bounds=assignment.bounds,
    )


def alone(
    checkpoint_dir: str | None, every_steps: int | None, every_seconds: float | None, keep: int
) -> Settings:
    """Under torchrun or plain python; `agreed` fills in the rest once ranks can talk."""
    stem = Path(sys.argv[0]).stem or "training"
    return Settings(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        checkpoint=Checkpointing(
            dir=str(Path(checkpoint_dir or f"checkpoints/{stem}").absolute()),
            every_steps=every_steps,
            keep=KeepRules(last=keep),
        ),
        every_seconds=every_seconds if every_seconds or every_steps else DEFAULT_SECONDS,
        check_model=True,
        config_files=(),
        token="",
        resume=None,
    )


def agreed(settings: Settings, model: Structure | None) -> Settings:
    """Without a supervisor: pass the gate here, and let all ranks take rank 0's answer.

    Where the script has no process group the ranks decide alike from the same files.
    """
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    answer: list[Any] = [None, None]
    if settings.rank == 0 or not together:
        answer = [_choose(settings, model), _token(settings, together)]
    if together:
        dist.broadcast_object_list(answer, src=0)
    outcome, token = answer
    if isinstance(outcome, NoAcceptableCheckpoint):
        raise outcome
    return replace(settings, resume=outcome, token=token)


def _choose(
    settings: Settings, model: Structure | None
) -> ResumePoint | NoAcceptableCheckpoint | None:
    store = Store(Path(settings.checkpoint.dir))
    with directory_lock.settled(store.root):
        complete(store)
        if settings.world_size == 1 or dist.is_initialized():
            sweep(store)  # the other ranks wait for this answer, so nothing is being written
    expectation = Expectation(settings.world_size, model.hash if model else None, model)
    choice = choose(candidates(store), expectation)
    if choice.accepted is not None and choice.accepted.manifest is not None:
        accepted = choice.accepted
        return ResumePoint(accepted.id, accepted.step, choice.accepted.manifest.digest)
    if choice.verdicts:
        return NoAcceptableCheckpoint(
            "no acceptable checkpoint:\n" + "\n".join(v.reason for v in choice.verdicts),
            hint=f"move {settings.checkpoint.dir} away to start from step 0",
        )
    return None


def _token(settings: Settings, together: bool) -> str:
    if together or settings.world_size == 1:
        return "x" + uuid.uuid4().hex[:8]
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    launch = uuid.uuid5(uuid.NAMESPACE_OID, "/".join(os.environ.get(n, "") for n in names))
    return "x" + launch.hex[:8]
