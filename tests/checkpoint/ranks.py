"""Real ranks for a test: forked processes with a gloo group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DIED = "died"


def ranks(directory: Path, world_size: int, work: Callable[[int], Any]) -> list[str]:
    """What `work(rank)` returned in each process, as text; DIED of one that died on its way.

    Fails with the traceback of a rank that raised.
    """
    place = directory / f"ranks-{os.urandom(4).hex()}"
    place.mkdir()
    children = [os.fork() or _child(place, world_size, rank, work) for rank in range(world_size)]
    for pid in children:
        os.waitpid(pid, 0)
    for raised in place.glob("*.raised"):
        raise AssertionError(raised.read_text())
    files = [place / str(rank) for rank in range(world_size)]
    return [file.read_text() if file.exists() else DIED for file in files]


def _child(place: Path, world_size: int, rank: int, work: Callable[[int], Any]) -> int:
    try:
        # OpenMP's threads are not there after a fork.
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), RANK=str(rank))
        store = dist.FileStore(str(place / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = work(rank)
        (place / str(rank)).write_text(str(result))
        dist.barrier()
    except BaseException:
        (place / f"{rank}.raised").write_text(traceback.format_exc())
    finally:
        os._exit(0)
