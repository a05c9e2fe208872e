"""What a session needs to know: from its supervisor or, without one, from the script."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.origin import Origin
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.job import secret
from autoglm_resume.protocol.assignment import Assignment, Beginning, Checkpointing, ResumePoint
from autoglm_resume.protocol.loss_guard import Bounds

DEFAULT_SECONDS = 300.0
DEFAULT_KEEP = 3
LARGEST_SCRIPT = 1 << 28
"""Bytes."""
NOTEBOOKS = {"ipykernel_launcher.py", "colab_kernel_launcher.py", "-c", "-"}
"""Whose arguments say nothing of what runs."""


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
    begins: Beginning | None = None
    bounds: Bounds = field(default_factory=Bounds)
    origin: Origin = field(default_factory=lambda: Origin(""))
    """Of the checkpoints to come."""
    named: bool = False
    """Whether the script names the directory; else every script of its name has it."""
    others: tuple[str, ...] = ()
    """What of the command that made the checkpoint is another one now, in words."""

    def of_the_run_of(self, before: Origin | None) -> Settings:
        """The same, for who goes on from a checkpoint of that origin."""
        if before is None:  # of an older version
            return self
        return replace(self, origin=replace(self.origin, run=before.run))


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
        begins=assignment.begins,
        origin=command(assignment.run_id),
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
        origin=command(),
        named=checkpoint_dir is not None,
    )


def command(run: str = "") -> Origin:
    """What this process runs."""
    script, *args = sys.argv or [""]
    if not script or Path(script).name in NOTEBOOKS:
        return Origin(run)
    path = Path(script).absolute()
    content = ""
    with suppress(OSError):
        content = digest(files.read(path, LARGEST_SCRIPT))
    return Origin(run, str(path), content, tuple(secret.arguments(args)))
