"""Follows what the ranks of one attempt write: their logs, and their events."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from autoglm_resume import files
from autoglm_resume.events import Event
from autoglm_resume.journal import decode
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.supervise.base.event_loop import EventLoop

AT_ONCE = 1 << 18
"""Bytes of one log that are shown per round; a flood beyond it stays in the file only."""
LONGEST_LINE = 1 << 14
_UP = "\x1b[A"
"""Moves the cursor to the line above."""

_LOG = re.compile(r"rank-(\d+)\.log\Z")
_EVENTS = re.compile(r"rank-(\d+)\.events\.jsonl\Z")


class LogFollower:
    """Calls `on_line(rank, text)` and `on_event(rank, event)` as the files of `directory` grow.

    `on_bar(rank, text)` hears of lines that are not over yet and are written anew again and again,
    with carriage returns: progress bars. Their earlier states are nothing to read.

    Ranks write to files and not to pipes, so a supervisor that is slow or dead never blocks one.
    """

    def __init__(
        self,
        loop: EventLoop,
        directory: Path,
        on_line: Callable[[int, str], None],
        on_event: Callable[[int, Event], None],
        on_bar: Callable[[int, str], None],
    ) -> None:
        self._loop = loop
        self._directory = directory
        self._on_line = on_line
        self._on_event = on_event
        self._on_bar = on_bar
        self._offsets: dict[str, int] = {}
        self._rest: dict[str, bytes] = {}
        self._logs: set[str] = set()
        self.quiet = False
        """While true, log lines wait; events still come through."""
        self._watch = DirectoryWatch()
        self._watch.add(directory)
        loop.watch(self._watch, self._readable)

    def drain(self) -> None:
        """Read everything there is now."""
        for path in sorted(self._directory.iterdir()):
            self._read(path.name)

    def close(self) -> None:
        """Read the rest and stop following."""
        self._loop.forget(self._watch)
        self.drain()
        for name in self._logs:
            rest = self._rest.pop(name, b"")
            if rest and (match := _LOG.match(name)):
                self._show(int(match[1]), rest)
        self._watch.close()

    def _readable(self) -> None:
        for name in set(self._watch.changed()):
            self._read(name)

    def _read(self, name: str) -> None:
        if match := _EVENTS.match(name):
            rank = int(match[1])
            for event in decode(self._lines(name, None)):
                self._on_event(rank, event)
        elif match := _LOG.match(name):
            self._logs.add(name)
            if not self.quiet:
                lines = self._lines(name, AT_ONCE)
                for line in lines.split(b"\n")[:-1]:
                    self._show(int(match[1]), line)
                self._show_bar(int(match[1]), name)

    def _lines(self, name: str, most: int | None) -> bytes:
        """New whole lines of a file; with `most`, the middle of a flood is left out."""
        try:
            with files.reading(self._directory / name) as file:
                start = self._offsets.get(name, 0)
                size = os.fstat(file.fileno()).st_size
                note = b""
                if most is not None and size - start > most:
                    skipped = size - start - most
                    note = self._rest.pop(name, b"") + (
                        b"\n[%d bytes not shown, see %s]\n" % (skipped, os.fsencode(name))
                    )
                    start = size - most
                file.seek(start)
                data = file.read(size - start)
        except OSError:
            return b""
        self._offsets[name] = start + len(data)
        whole, newline, rest = (self._rest.pop(name, b"") + note + data).rpartition(b"\n")
        if most is not None:
            rest = _last_state(rest)
            if len(rest) > LONGEST_LINE:
                whole, newline, rest = whole + newline + rest, b"\n", b""
        self._rest[name] = rest
        return whole + newline

    def _show_bar(self, rank: int, name: str) -> None:
        rest = self._rest.get(name, b"")
        if b"\r" in rest:
            self._on_bar(rank, rest.decode(errors="backslashreplace"))

    def _show(self, rank: int, line: bytes) -> None:
        text = line[:LONGEST_LINE].decode(errors="backslashreplace").rstrip("\r")
        if _UP in text:  # one of several bars, of which each is a line that is written anew
            self._on_bar(rank, text)
        else:
            self._on_line(rank, text)


def _last_state(line: bytes) -> bytes:
    """Of a line that is written anew again and again, what is to be seen of it now."""
    begin = line.rstrip(b"\r").rfind(b"\r")
    if begin <= 0:
        return line
    return (_UP.encode() if _UP.encode() in line else b"") + line[begin:]
