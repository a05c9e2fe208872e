"""A progress bar on standard error, for people who wait: only on a terminal, only after a while."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from autoglm_resume.observe.pure.say import seconds, size
from autoglm_resume.observe.tables import terminal

_AFTER = 2.0
"""Seconds before it appears."""
_EVERY = 0.1
"""Seconds between two pictures."""
_WIDTH = 30


class Progress:
    """Call it with the bytes done since the last call, from any thread."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._next = self._began + _AFTER
        self._shown = False
        self._lock = threading.Lock()
        self._terminal = terminal(sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._terminal and now >= self._next:
                self._next = now + _EVERY
                self._shown = True
                line = bar(self._what, self._done, self._total, now - self._began)
                print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)


def bar(what: str, done: int, total: int, elapsed: float) -> str:
    """One picture; bytes and seconds."""
    share = min(1.0, done / total) if total else 1.0
    filled = round(share * _WIDTH)
    left = elapsed * (1 - share) / share if share else None
    return (
        f"{what} {'━' * filled}{' ' * (_WIDTH - filled)} {share:4.0%} of {size(total)}, "
        f"{size(int(done / elapsed) if elapsed else 0)}/s, {seconds(left)} left"
    )
