"""What a session needs to know: from its supervisor or, without one, from the script."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.protocol.assignment import Assignment, Checkpointing, ResumePoint
from autoglm_resume.protocol.loss_guard import Bounds

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


def unsupervised(
    checkpoint_dir: str | None, every_steps: int | None, every_seconds: float | None, keep: int
) -> Settings:
    """Under torchrun or plain python; `alone.agreed` fills in the rest once ranks can talk."""
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
