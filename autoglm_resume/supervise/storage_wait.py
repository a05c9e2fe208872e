"""Waiting until a full disk has room again, or storage that was away answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoglm_resume.protocol.assignment import HOME
from autoglm_resume.supervise.base.event_loop import EventLoop

EVERY = 2.0
"""Seconds between two looks."""
PATIENCE = 30.0
"""Seconds after which storage that has not answered a look does not answer."""


ENDED_EARLY = "a stop was asked for before storage had answered"


class StorageWait:
    """Looks at directories, from a process of its own each time, that a pause waits for."""

    def __init__(self, loop: EventLoop, directories: Sequence[Path], cancelled: Callable[[], bool]):
        """The first of `directories` is the one that needs room."""
        self._loop = loop
        self._directories = directories
        self._cancelled = cancelled
        self._stuck: subprocess.Popen[str] | None = None

    def wait(self, needed: int, longest: float, tell: Callable[[str], object]) -> str:
        """Wait at most `longest` seconds until there are `needed` bytes of room.

        Returns what is still wrong, empty if nothing is; `tell` hears of the first problem. Ends
        early, with a problem, when it is `cancelled`.
        """
        until = time.monotonic() + longest
        told = False
        while problem := self.look(needed):
            if self._cancelled():
                break
            if not told:
                tell(problem)
                told = True
            if time.monotonic() >= until:
                break
            if self._loop.wait(self._cancelled, min(until, time.monotonic() + EVERY)):
                break
        return problem

    def look(self, needed: int) -> str:
        """What is wrong now, empty if nothing is."""
        silent = f"{self._directories[0]}: does not answer"
        if self._stuck is not None and self._stuck.poll() is None:
            return silent  # and another one would only wait beside it
        process = self._stuck = subprocess.Popen(
            [
                *(sys.executable, "-m", "autoglm_resume.supervise.preflight.disk_probe"),
                *(str(needed), *map(str, self._directories)),
            ],
            cwd=HOME,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        fd = os.pidfd_open(process.pid)
        self._loop.watch(fd, lambda: _reap(process))
        try:
            self._loop.wait(
                lambda: process.returncode is not None or self._cancelled(),
                time.monotonic() + PATIENCE,
            )
        finally:
            self._loop.forget(fd)
            os.close(fd)
        assert process.stderr is not None
        with process.stderr as said:
            if process.returncode is None:
                process.kill()  # which one that is stuck in the kernel does not hear yet
                return ENDED_EARLY if self._cancelled() else silent
            return said.read().strip() if process.returncode else ""


def _reap(process: subprocess.Popen[str]) -> None:
    process.poll()
