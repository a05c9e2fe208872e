"""Every error a person can meet, one exit code per class.

    AutoglmError                 1   the job failed and will fail again
    ├── UsageError               2   a wrong argument, job file or directory
    ├── Interrupted             75   stopped with a checkpoint saved: run me again
    │   └── Unkillable               a rank is stuck in the kernel: this machine is of no use
    ├── RunLocked               76   another supervisor has this run
    ├── CheckpointError         90   a checkpoint cannot be used
    │   ├── CorruptCheckpoint        its bytes are not what was written
    │   ├── NewerFormat              written by a newer autoglm
    │   ├── WorldSizeMismatch        made by another number of ranks
    │   ├── ModelMismatch            made by another model
    │   ├── ObjectMismatch           the script's objects are others than those it has
    │   └── NoAcceptableCheckpoint   checkpoints exist, none passes the gate
    ├── LossDiverged             1   the loss is not finite any more, or leapt
    └── DoNotRequeue            93   finished badly, and a scheduler must not try again

A process that died by signal N makes the command exit 128 + N; see `died_by_signal`.
The message says which file, what was expected, what was found; `hint` says what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class AutoglmError(Exception):
    """The job failed, and running it again unchanged would fail again."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:  # below the message wherever a traceback is shown: in a notebook, of a child
            self.__notes__ = [f"hint: {hint}"]


class UsageError(AutoglmError):
    """A wrong argument, job file or directory: nothing was started."""

    exit_code = 2


class Interrupted(AutoglmError):
    """Stopped on request with a checkpoint saved; the same command continues the run."""

    exit_code = 75


class Unkillable(Interrupted):
    """A rank is stuck in the kernel; the run can continue from its checkpoint elsewhere."""


class RunLocked(AutoglmError):
    """Another supervisor has this run."""

    exit_code = 76


class CheckpointError(AutoglmError):
    """A checkpoint cannot be used."""

    exit_code = 90


class CorruptCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, torn, or differs from its digest."""


class NewerFormat(CheckpointError):
    """A checkpoint was written by a newer autoglm than this one."""


class WorldSizeMismatch(CheckpointError):
    """A checkpoint was made by another number of ranks."""


class ModelMismatch(CheckpointError):
    """A checkpoint was made by a model with other parameters."""


class ObjectMismatch(CheckpointError):
    """What the script tracks is another now: objects, an optimizer's groups, or a mesh."""


class NoAcceptableCheckpoint(CheckpointError):
    """Checkpoints are present, but the gate accepts none of them."""


class LossDiverged(AutoglmError):
    """The loss says that the model is lost; an older checkpoint may not be."""


class DoNotRequeue(AutoglmError):
    """The job asked not to be run again (a rank exited 93)."""

    exit_code = 93


def died_by_signal(number: int) -> int:
    """Exit code of a command that died by signal `number`, as shells report it."""
    return 128 + number
