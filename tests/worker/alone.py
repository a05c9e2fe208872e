"""Sessions without a supervisor, several of them in one process that is none of theirs."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.savers.directory_lock import settled
from autoglm_resume.worker import alone
from autoglm_resume.worker.base import rng

_exits: list[Callable[[], object]] = []


@contextmanager
def lonely(directory: Path) -> Iterator[None]:
    """Sessions are alone, in `directory`, and end when `end_process` says so."""
    state = rng.capture()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "AUTOGLM_ASSIGNMENT", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.chdir(directory)
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(atexit, "register", _exits.append)
        patch.setattr(alone, "_code", 0)  # or pytest would end as a script does
        yield
        end_process()
        _exits.clear()
    rng.restore(state)


def end_process() -> None:
    """As far as the sessions so far are concerned."""
    for leave in _exits:
        leave()
    alone._trained.clear()


def checkpoints() -> list[str]:
    """Ids, oldest first, once the sessions so far and their savers have ended."""
    end_process()
    with settled(Path("ckpt")):
        return [path.name for path in reversed(Store(Path("ckpt")).committed())]
