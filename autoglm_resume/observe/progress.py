"""What people see who wait, on standard error: a bar for bytes, a spinner for all else.

rich is imported only where there is a terminal and something to show.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from autoglm_resume import output
from autoglm_resume.observe.tables import terminal

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from autoglm_resume.linux import DirectoryWatch

_AFTER = 2.0
"""Seconds before a bar appears."""


class _Live:
    """A context in which something moves on the terminal, if there is one."""

    _picture: RichProgress | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._picture is not None:
            self._picture.stop()


class Progress(_Live):
    """Call it with the bytes done since the last call, from any thread."""

    def __init__(self, what: str, total: int) -> None:
        self._what = output.printable(what)
        self._total = total
        self._done = 0
        self._due = time.monotonic() + _AFTER
        self._lock = threading.Lock()
        self._live = terminal(sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._picture is None and self._live and time.monotonic() >= self._due:
                self._picture = _bar(self._what, self._total)
            if self._picture is not None:
                self._picture.update(self._picture.task_ids[0], completed=self._done)


class Waiting(_Live):
    """Says what one waits for: a spinner with the time on a terminal, elsewhere one line."""

    def __init__(self, what: str) -> None:
        self._what = output.printable(what)
        self._live = terminal(sys.stderr)

    def __enter__(self) -> Waiting:
        if self._live:
            self._picture = _spinner(self._what)
        else:
            output.say(self._what)
        return self

    def now(self, what: str) -> None:
        """It is for something else, or more is known of it."""
        if self._picture is not None:
            self._picture.update(self._picture.task_ids[0], description=output.printable(what))

    def until(self, *sources: int | DirectoryWatch) -> None:
        """Return when one of `sources` is readable."""
        select.select(sources, [], [])


def _bar(what: str, total: int) -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    shown.add_task(what, total=total)
    shown.start()
    return shown


def _spinner(what: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    shown.add_task(what, total=None)
    shown.start()
    return shown
