"""Whether what a checkpoint describes can be held in memory at all.

What repeats is stored once, so a few bytes of a document may describe a gigabyte; whoever made them
need not mean well, and a process that takes more than there is is killed without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from autoglm_resume.checkpoint.format.snapshot import TensorBytes
from autoglm_resume.checkpoint.format.tables import Tensor
from autoglm_resume.errors import CheckpointError

_MEANT = ("MemTotal:", "SwapTotal:")


def require(what: str, tensors: Iterable[Tensor | TensorBytes]) -> None:
    """Raise CheckpointError, naming `what`, if no memory here could hold the tensors at once."""
    needed, there = sum(tensor.nbytes for tensor in tensors), there_is()
    if needed > there:
        raise CheckpointError(
            f"{what}: expected tensors of at most {there} bytes, as there is memory, found {needed}"
        )


def there_is() -> int:
    """Bytes of memory and swap that this machine, or container, has in all."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = sum(1024 * int(line.split()[1]) for line in lines if line.startswith(_MEANT))
    with suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
