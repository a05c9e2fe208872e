"""The journal: append-only `events.jsonl` of a run, its only history.

One JSON object a line: `event` (what), `time` (Unix seconds), `mono` (CLOCK_MONOTONIC seconds,
which a changed wall clock does not touch; it is comparable between the processes of one boot),
`attempt`, and what belongs to the event. A line that a crash tore is isolated and skipped.

Ranks write the same kind of lines to files of their own, which the supervisor follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from autoglm_resume import events, files
from autoglm_resume.events import Event, to_record

LARGEST = 1 << 32
"""Bytes of a journal: years of saving every second."""


def stamped(event: Event, *, attempt: int | None = None, rank: int | None = None) -> Event:
    """`event`, as one of now, of this attempt and this rank, unless it says otherwise itself."""
    stamps = {"time": time.time(), "mono": time.monotonic(), "attempt": attempt, "rank": rank}
    unset = [name for name, own in vars(event).items() if own is None and name in stamps]
    return event.but(**{name: stamps[name] for name in unset})


def encode(event: Event) -> bytes:
    """One line."""
    return json.dumps(to_record(event), separators=(",", ":"), default=str).encode() + b"\n"


def decode(lines: bytes) -> Iterator[Event]:
    """The events in whole lines; what is not a JSON object with an `event` is skipped."""
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("event"), str):
                yield events.read(found)


def read(path: Path) -> list[Event]:
    """Every event of a journal, oldest first; none if there is no such file."""
    try:
        return list(decode(files.read(path, LARGEST)))
    except FileNotFoundError:
        return []


def read_end(path: Path, limit: int) -> tuple[list[Event], bool]:
    """The events in the last `limit` bytes of a journal, and whether these are all."""
    try:
        with files.reading(path) as file:
            begin = max(0, file.seek(0, os.SEEK_END) - limit)
            file.seek(begin)
            if begin:
                file.readline()
            return list(decode(file.read())), not begin
    except FileNotFoundError:
        return [], True


class Journal:
    """The one writer of a journal.

    A full disk must not stop a supervisor: lines that could not be written wait in memory and go
    out, in order, with the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._waiting = b"\n"  # a crash tore the last line: keep it apart from ours

    def append(self, event: Event) -> Event:
        """Write `event`: safe from the death of this process, and after `sync` of the machine."""
        self._waiting += encode(event)
        self._write()
        return event

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]

    @property
    def behind(self) -> bool:
        """Whether lines wait for room on the disk."""
        return bool(self._waiting)

    def sync(self) -> None:
        """Make what was written survive the machine."""
        with contextlib.suppress(OSError):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Flush and close."""
        self._write()
        self.sync()
        os.close(self._fd)
