"""The classes of failures and the answers to them, by the names that job files use. Pure."""

from __future__ import annotations

import enum


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
