"""Events of one rank: rare, so each is a line appended to a file that the supervisor follows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from autoglm_resume.events import Event
from autoglm_resume.journal import encode, stamped


class EventLog:
    """Appends events to a file; without one (no supervisor) they go nowhere."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self._path = path
        self._rank = rank
        self._torn = False

    def emit(self, event: Event, /) -> None:
        """Write one event. A full disk loses it, and never the training."""
        if self._path is None:
            return
        line = encode(stamped(event, rank=self._rank))
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                # A line that a full disk cut short must not swallow this one.
                written = os.write(fd, b"\n" + line if self._torn else line)
                self._torn = written < len(line)
            finally:
                os.close(fd)
