"""What the ranks printed: of one attempt, or followed from attempt to attempt."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from autoglm_resume import files, output
from autoglm_resume.errors import UsageError
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.observe.tables import terminal
from autoglm_resume.supervise.base.run_directory import RunDirectory

_LOG = re.compile(r"rank-(\d+)\.log\Z")
LONGEST_LINE = 1 << 20
"""Bytes; what is longer is shown as several lines."""
_ELSEWHERE = 1.0
"""Seconds between looks at a run on another host, of which the kernel here does not know."""

Print = Callable[[int, bytes], None]


def attempts(run: RunDirectory) -> list[int]:
    """Attempts that have a directory, oldest first."""
    try:
        names = [path.name for path in run.attempts.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def choose(run: RunDirectory, attempt: int | None) -> int:
    """`attempt`, or the newest. Raises UsageError if it does not exist."""
    found = attempts(run)
    if not found:
        raise UsageError(f"{run.path}: no attempt was started yet")
    if attempt is None:
        return found[-1]
    if attempt not in found:
        raise UsageError(f"{run.path}: no attempt {attempt}; found {found[0]} to {found[-1]}")
    return attempt


class LogReader:
    """The logs of one attempt, as far as they were read."""

    def __init__(self, directory: Path, rank: int | None, show: Print) -> None:
        self._directory = directory
        self._rank = rank
        self._show = show
        self._offsets: dict[int, int] = {}
        self._rest: dict[int, bytes] = {}

    @property
    def ranks(self) -> list[int]:
        """Ranks that have a log and are wanted."""
        with contextlib.suppress(FileNotFoundError):
            found = (_LOG.match(path.name) for path in self._directory.iterdir())
            ranks = sorted(int(match[1]) for match in found if match)
            return [rank for rank in ranks if self._rank in (None, rank)]
        return []

    def read(self) -> None:
        """Show the whole lines that are new, rank by rank."""
        for rank in self.ranks:
            path = self._directory / f"rank-{rank}.log"
            with files.reading(path) as file:
                file.seek(self._offsets.get(rank, 0))
                while (piece := file.readline(LONGEST_LINE)) and not output.unread():
                    line = self._rest.pop(rank, b"") + piece
                    if line.endswith(b"\n") or len(line) >= LONGEST_LINE:
                        self._show(rank, line.removesuffix(b"\n"))
                    else:
                        self._rest[rank] = line
                self._offsets[rank] = file.tell()

    def finish(self) -> None:
        """Show also what lacks its newline."""
        self.read()
        for rank, rest in sorted(self._rest.items()):
            self._show(rank, rest)
        self._rest.clear()


def printer(*, prefix: bool) -> Print:
    """Prints lines on standard output: made safe for a terminal, untouched elsewhere."""
    for_person = terminal(sys.stdout)

    def show(rank: int, line: bytes) -> None:
        mark = f"[rank {rank}] " if prefix else ""
        if for_person:
            sys.stdout.write(f"{mark}{output.printable(line, colors=True)}\n")
        else:
            sys.stdout.buffer.write(mark.encode() + line + b"\n")

    return show


def show(run: RunDirectory, rank: int | None, attempt: int | None) -> None:
    """Print the logs of one attempt. Raises UsageError if there is none of that rank."""
    number = choose(run, attempt)
    reader = LogReader(run.attempt(number), rank, printer(prefix=rank is None))
    if not reader.ranks:
        raise UsageError(
            f"{run.attempt(number)}: no log" + ("" if rank is None else f" of rank {rank}")
        )
    reader.finish()


def show_earlier(run: RunDirectory, rank: int | None) -> None:
    """Print the logs of all attempts before the newest, saying which they are."""
    newest = choose(run, None)
    for number in attempts(run):
        output.flush()
        output.say(f"attempt {number}")
        if number < newest:
            LogReader(run.attempt(number), rank, printer(prefix=rank is None)).finish()


def follow(run: RunDirectory, rank: int | None, attempt: int | None) -> None:
    """Print logs as they grow, on to the next attempt, until the run (or `attempt`) ends."""
    number = choose(run, attempt)
    show = printer(prefix=rank is None)
    watch = DirectoryWatch()
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    with contextlib.suppress(OSError, ValueError):
        poll.register(sys.stdout.fileno(), 0)  # wakes when the reader leaves
    run.attempts.mkdir(exist_ok=True)
    watch.add(run.attempts)
    handle = watch.add(run.attempt(number))
    reader = LogReader(run.attempt(number), rank, show)
    with _end_of(run) as (supervisor, timeout):
        if supervisor is not None:
            poll.register(supervisor, select.POLLIN)
        while True:
            # Asked before the last read: what was written until then is read.
            over = _is_over(run, supervisor)
            newer = [other for other in attempts(run) if other > number]
            reader.read()
            sys.stdout.flush()
            if newer or over:
                reader.finish()
                sys.stdout.flush()
            if newer and attempt is None:
                number = newer[0]
                watch.remove(handle)
                handle = watch.add(run.attempt(number))
                reader = LogReader(run.attempt(number), rank, show)
                output.say(f"attempt {number}")
                continue
            if newer or over or output.unread():
                break
            poll.poll(timeout)
            for _ in watch.changed():
                pass
    watch.close()


@contextlib.contextmanager
def _end_of(run: RunDirectory) -> Iterator[tuple[int | None, int | None]]:
    """Yields a descriptor that is readable when the supervisor ends, and how long to wait in ms."""
    holder = run.holder()
    supervisor = None
    if holder is not None and holder.host == socket.gethostname():
        with contextlib.suppress(OSError):
            supervisor = os.pidfd_open(holder.pid)
    try:
        yield supervisor, None if supervisor is not None else int(_ELSEWHERE * 1000)
    finally:
        if supervisor is not None:
            os.close(supervisor)


def _is_over(run: RunDirectory, supervisor: int | None) -> bool:
    if supervisor is None:
        return run.holder() is None
    return bool(select.select([supervisor], [], [], 0)[0])
