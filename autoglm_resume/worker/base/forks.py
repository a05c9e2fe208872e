"""Whether this is the process that trains, or a fork of it: a helper that the script made.

A fork has copies of the session, of its handlers and of its open loops, and speaks for no rank.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable

_trains = os.getpid()


def begin() -> None:
    """This process trains."""
    global _trains
    _trains = os.getpid()


def is_helper() -> bool:
    """Whether this process was forked from the one that trains."""
    return os.getpid() != _trains


def at_exit(handler: Callable[[], None]) -> None:
    """This process trains, and `handler` belongs to its end."""
    begin()

    def unless_forked() -> None:
        if not is_helper():
            handler()

    atexit.register(unless_forked)
