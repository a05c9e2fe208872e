"""The Python stacks of ranks that hang, before they are killed.

Each rank writes its own, out of a signal handler in C (faulthandler): that needs no ptrace, and
works while the rank holds the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from autoglm_resume.protocol.assignment import RANK, STACKS
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.group import WorkerGroup

PATIENCE = 1.0
"""Seconds for all ranks to write them; one in uninterruptible sleep never does."""

_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x.*$", re.MULTILINE)
_OUTERMOST = "in _run_module_as_main"
"""Every rank begins with `python -m`."""
_CUT = "  ..."
"""After a hundred frames."""


def collect(
    loop: EventLoop, group: WorkerGroup, ranks: Sequence[int], path: Callable[[int], Path]
) -> dict[int, tuple[str, ...]]:
    """Ask `ranks` for their stacks, to be found at `path(rank)`; returns those of main threads.

    Frames read “file:line in function”, innermost first. The loop must be watching the directory
    of these files, or an answer is only seen when something else happens.
    """
    for rank in ranks:
        group.signal(rank, STACKS)
        group.signal(rank, signal.SIGCONT)  # a stopped process acts on signals when it goes on
    found: dict[int, tuple[str, ...]] = {}

    def all_there() -> bool:
        for rank in ranks:
            if rank in group.alive and rank not in found and (frames := _read(path(rank))):
                found[rank] = frames
        return all(rank in found or rank not in group.alive for rank in ranks)

    loop.wait(all_there, time.monotonic() + PATIENCE)
    return found


def _read(path: Path) -> tuple[str, ...]:
    try:
        return main_thread(path.read_text(errors="replace"))
    except OSError:
        return ()


def main_thread(text: str) -> tuple[str, ...]:
    """The frames of the oldest thread, as faulthandler writes them: it comes last.

    None while they are not all there. What is autoglm's own, below the script, is left out.
    """
    _, *blocks = _THREAD.split(text)
    lines = blocks[-1].splitlines() if blocks else []
    if not any(line == _CUT or line.endswith(_OUTERMOST) for line in lines):
        return ()
    frames = [match.groups() for match in map(_FRAME.match, lines) if match]
    names = [file for file, _, _ in frames]
    end = names.index(RANK) if RANK in names else len(frames)
    return tuple(f"{file}:{line} in {function}" for file, line, function in frames[:end])


def tidy(paths: Iterable[Path]) -> None:
    """Remove the files of ranks that never had to write."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
