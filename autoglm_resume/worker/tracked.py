"""What a session needs to know about the objects that a script gives it to track."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from autoglm_resume.worker.data import ResumableSampler


def deals_data(obj: Any) -> bool:
    """A sampler, or a stateful loader such as torchdata's."""
    return isinstance(obj, ResumableSampler) or "DataLoader" in type(obj).__name__


def never_free(obj: object) -> None:
    """Let only the end of the process take `obj` away.

    A DistributedDataParallel that is freed after destroy_process_group joins gloo's threads while
    it holds the GIL that one of them may be waiting for: with torch 2.13 under load, ranks that
    were done hung three times in a row.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))


def led_by_rank_zero(obj: Any) -> bool:
    """Whether every forward pass begins with the buffers (as of a BatchNorm) of rank 0."""
    obj = getattr(obj, "_orig_mod", obj)
    return isinstance(obj, torch.nn.parallel.DistributedDataParallel) and obj.broadcast_buffers


def unwrapped(obj: Any) -> Any:
    """The module inside DistributedDataParallel and torch.compile: its names do not change."""
    while True:
        if isinstance(obj, torch.nn.parallel.DistributedDataParallel):
            obj = obj.module
        elif isinstance(obj, torch.nn.Module) and hasattr(obj, "_orig_mod"):
            obj = obj._orig_mod
        else:
            return obj
