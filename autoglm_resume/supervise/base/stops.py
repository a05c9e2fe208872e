"""The requests to save and to stop that a supervisor can have, and those to stop it has had."""

from __future__ import annotations

import signal
from collections.abc import Iterator

SAVE = signal.SIGRTMIN
"""Asks for a checkpoint, and to go on."""
ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ask for a checkpoint, and to stop."""


class Stops:
    """True once there is one. They come from signals, time limits and `autoglm stop`."""

    def __init__(self) -> None:
        self._asked: list[signal.Signals] = []

    def __bool__(self) -> bool:
        return bool(self._asked)

    def __iter__(self) -> Iterator[signal.Signals]:
        return iter(self._asked)

    def add(self, number: signal.Signals) -> bool:
        """One more; whether it is the first."""
        self._asked.append(number)
        return len(self._asked) == 1

    @property
    def first(self) -> signal.Signals | None:
        """What the run is stopped by, None while nobody has asked."""
        return self._asked[0] if self._asked else None

    def asked(self) -> bool:
        """The same as its truth, to wait for."""
        return bool(self)

    def hurried(self) -> bool:
        """Whether a person insists: a second Ctrl-C. Schedulers send SIGTERM over and over."""
        return self._asked.count(signal.SIGINT) > 1
