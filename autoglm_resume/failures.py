"""The classes of failures and the answers to them, by the names that job files use. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Kind(enum.Enum):
    """What ended an attempt. The value is its name in `restart.on` and in the journal."""

    KILLED = "killed"
    """By a signal from outside, SIGKILL most of all, and nothing says why."""
    CRASHED = "crashed"
    """By a signal of its own making: SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE."""
    EXITED = "exited"
    """With an exit code and no exception."""
    EXCEPTION = "exception"
    """One that no other class claims."""
    CODE_ERROR = "code_error"
    """The same exception at the same place again, without progress in between."""
    LAUNCH = "launch"
    """The script could not be imported or started."""
    CUDA_OOM = "cuda_oom"
    HOST_OOM = "host_oom"
    """The kernel's OOM killer, or no memory left to allocate."""
    COMMUNICATION = "communication"
    """NCCL or gloo: a timeout, a lost connection, and no rank that failed by itself."""
    GPU_FAULT = "gpu_fault"
    """XID, ECC, fell off the bus."""
    HANG = "hang"
    STRAGGLER = "straggler"
    DIVERGED = "diverged"
    """The loss is not finite, or leapt."""
    DATA_ERROR = "data_error"
    DISK_FULL = "disk_full"
    STORAGE = "storage"
    """A file system or object store that does not answer."""
    REFUSED = "checkpoint_rejected"
    """A rank would not load the checkpoint that the gate had accepted."""
    USAGE_ERROR = "usage_error"
    """The script uses autoglm in a way that cannot do, and was told so."""
    NO_RESULT = "no_result"
    """The script ended well, and its last steps are in no checkpoint."""
    PORT = "port_in_use"
    PREEMPTED = "preempted"
    """A scheduler took the machine."""
    STOPPED = "stopped"
    """A person stopped it."""
    UNKNOWN = "unknown"


class Answer(enum.Enum):
    """What a job file may ask for in `restart.on`."""

    RESTART = "restart"
    ROLL_BACK = "roll_back"
    """Restart from one checkpoint further back."""
    PAUSE = "pause"
    """Until space or the storage is back."""
    SMALLER = "smaller"
    """Restart without the rank's GPU, with fewer ranks."""
    REQUEUE = "requeue"
    """Exit 75: a scheduler is to start it elsewhere."""
    STOP = "stop"


@dataclass(frozen=True)
class Traits:
    """What is true of every failure of a class."""

    means: str
    """In a sentence, after the name of the class."""
    called: str = ""
    """Before a sentence that says what died, where that does not name the class itself."""
    heals: bool = False
    """Whether time may heal it: worth another try later; of all others the same one again means
    that it will come again."""
    free: bool = False
    """Whether it is what the run cannot help: it spends no budget."""
    answer: Answer = Answer.RESTART
    """Where the job does not map the class."""
    of_code: bool = False
    """Whether the same one again at the same place is an error of the code."""
    like_gpu: bool = False
    """Whether a GPU that breaks can look like it."""


TRAITS: Mapping[Kind, Traits] = {
    Kind.KILLED: Traits("a signal from outside ended it, and nothing says who sent it", heals=True),
    Kind.CRASHED: Traits(
        "it crashed: the signal was of its own making", heals=True, of_code=True, like_gpu=True
    ),
    Kind.EXITED: Traits(
        "it exited by itself, with an exit code and no exception", of_code=True, like_gpu=True
    ),
    Kind.EXCEPTION: Traits("an exception that no other class claims", of_code=True, like_gpu=True),
    Kind.CODE_ERROR: Traits(
        "the code failed at the same place again, and no step came between",
        "the same error as before, without progress",
    ),
    Kind.LAUNCH: Traits("the script could not be imported or started", "the script did not start"),
    Kind.CUDA_OOM: Traits("the GPU's memory was full", "out of GPU memory"),
    Kind.HOST_OOM: Traits("the host's memory was full", "out of host memory", heals=True),
    Kind.COMMUNICATION: Traits(
        "the ranks lost each other, and none of them failed by itself",
        "the ranks lost each other",
        heals=True,
        like_gpu=True,
    ),
    Kind.GPU_FAULT: Traits(
        "the GPU or its driver failed",
        "GPU fault",
        heals=True,
        answer=Answer.SMALLER,
        like_gpu=True,
    ),
    Kind.HANG: Traits(
        "it made no progress for longer than its own pace allows", heals=True, like_gpu=True
    ),
    Kind.STRAGGLER: Traits("it was much slower than its peers for too long", heals=True),
    Kind.DIVERGED: Traits(
        "the loss is not a number, or leapt", "the training diverged", answer=Answer.ROLL_BACK
    ),
    Kind.DATA_ERROR: Traits("the data could not be read", "data error"),
    Kind.DISK_FULL: Traits("the disk was full", "disk full", heals=True, answer=Answer.PAUSE),
    Kind.STORAGE: Traits(
        "the storage did not answer", "storage failed", heals=True, answer=Answer.PAUSE
    ),
    Kind.REFUSED: Traits("the rank would not load the checkpoint that the gate had accepted"),
    Kind.USAGE_ERROR: Traits(
        "the script asks for what autoglm cannot do, and would again", answer=Answer.STOP
    ),
    Kind.NO_RESULT: Traits(
        "the script came to its end, and what it was to leave is in no checkpoint",
        answer=Answer.STOP,
    ),
    Kind.PORT: Traits("somebody else had the port", "port in use", heals=True),
    Kind.PREEMPTED: Traits(
        "the scheduler took the machine",
        "preempted",
        heals=True,
        free=True,
        answer=Answer.REQUEUE,
    ),
    Kind.STOPPED: Traits("a person stopped it", free=True, answer=Answer.REQUEUE),
    Kind.UNKNOWN: Traits("the evidence fits no class", heals=True),
}
"""A row for every class."""


def known(name: str) -> Kind | None:
    """A class by its name in the journal, None for one of a newer version."""
    return next((kind for kind in Kind if kind.value == name), None)
