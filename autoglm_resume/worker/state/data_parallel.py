"""What DistributedDataParallel has wrapped, wherever the script keeps it."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch


def any_has(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any of them belongs to a module that is wrapped.

    Looks at all objects there are, because scripts may track the module inside, or wrap it after
    they have tracked it: for where that time does not matter.
    """
    wanted = {id(parameter) for parameter in parameters}
    wrapper = torch.nn.parallel.DistributedDataParallel
    return any(
        id(parameter) in wanted
        for obj in gc.get_objects()
        if issubclass(type(obj), wrapper)
        for parameter in obj.parameters()
    )
