"""The console of a running job: worker lines, sentences, and one live line at the bottom.

Written for an event loop: nothing here waits, starts a thread, or raises. A console that is gone
(`| head`), or that nobody reads on (Ctrl-S), costs its lines and never the training.
"""

from __future__ import annotations

import errno
import math
import os
import select
import time
from collections.abc import Sequence
from typing import Literal

from autoglm_resume.events import (
    AttemptEnded,
    Committed,
    DecisionMade,
    Event,
    GatePassed,
    PartFailed,
)
from autoglm_resume.observe.pure.failed_saves import FailedSaves
from autoglm_resume.observe.pure.held_tracebacks import HeldTracebacks, Lines
from autoglm_resume.observe.pure.say import sentence
from autoglm_resume.output import PIECE, printable

Console = Literal["all", "rank0", "none"]

_PATIENCE = 200
"""Milliseconds to wait for a reader who has fallen behind."""
_QUIET = 30.0
"""Seconds between status lines where there is no terminal."""
_NAMED = 4
"""Ranks that are named where all might be."""
_LAST = ("give_up", "requeue")
"""Decisions after which the run does not go on here."""

_RESET, _ERASE = "\x1b[0m", "\r\x1b[2K"
_RED, _GREEN, _YELLOW, _MAGENTA, _DIM = (f"\x1b[{n}m" for n in (31, 32, 33, 35, 2))
_RANKS = tuple(f"\x1b[{n}m" for n in (36, 34, 35, 32, 33, 96, 94, 95, 92, 93))
_MOODS = {
    "failure": _RED,
    "refused": _RED,
    "quarantined": _RED,
    "save_failed": _RED,
    "run_failed": _RED,
    "zygote_lost": _YELLOW,
    "cold_start": _YELLOW,
    "decision": _YELLOW,
    "stop_requested": _YELLOW,
    "run_interrupted": _YELLOW,
    "first_step": _GREEN,
    "run_completed": _GREEN,
    "drill": _MAGENTA,
    "committed": _DIM,
    "save_cut_off": _DIM,
    "zygote_ready": _DIM,
}


class Sink:
    """A descriptor to print on, from which nothing comes back."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._dead = False
        self._stalled = False
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        try:
            self.terminal = os.isatty(fd) and os.environ.get("TERM") != "dumb"
        except OSError:
            self.terminal, self._dead = False, True

    @property
    def colors(self) -> bool:
        """Whether colours are wanted here; https://no-color.org."""
        return self.terminal and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """Width of the terminal."""
        try:
            return os.get_terminal_size(self.fd).columns or 80
        except OSError:
            return 80

    def write(self, text: str) -> None:
        """Print `text`, or lose it."""
        if self._lost and not self._dead and self._writable(0):
            note = f"\nautoglm: {self._lost} pieces of output were not shown, the logs have them\n"
            self._lost = 0
            self._stalled = False
            text = note + text
        data = memoryview(text.encode("utf-8", "replace"))
        while data and not self._dead:
            if not self._writable(0 if self._stalled else _PATIENCE):
                self._stalled = True
                self._lost += 1
                return
            self._stalled = False
            try:
                data = data[os.write(self.fd, data[:PIECE]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                self._lost += 1
                # A file on a full disk may have room again; a terminal or reader that left is gone.
                self._dead = error.errno != errno.ENOSPC
                return

    def _writable(self, milliseconds: int) -> bool:
        # A closed reader makes poll return too; the write then finds out.
        return bool(self._poll.poll(milliseconds))


class Screen:
    """Standard output has what the ranks print, standard error has everything else.

    With `json` the ranks' lines go to standard error too: standard output is then for one JSON
    document at the end.
    """

    def __init__(
        self,
        console: Console = "all",
        *,
        json: bool = False,
        out: int = 1,
        err: int = 2,
    ) -> None:
        self.console: Console = console
        self._err = Sink(err)
        self._out = self._err if json else Sink(out)
        self._status = ""
        self._shown = -_QUIET
        self._held = HeldTracebacks()
        self._failed: tuple[int, str, list[int]] | None = None
        """Rank and traceback of the last failure, and who else raised: to be shown."""
        self._seen = ""
        """The last traceback that was shown."""
        self._bar = ""
        self._failed_saves = FailedSaves()

    def worker_line(self, rank: int, text: str | bytes) -> None:
        """One line that `rank` printed."""
        if self.console == "none" or (self.console == "rank0" and rank != 0):
            return
        line = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if rank == 0:
            self._bar = ""
        self._lines(self._held.take(rank, line, time.monotonic()))

    def bar(self, rank: int, text: str) -> None:
        """The state of a progress bar of `rank`; those of rank 0 are shown, while they move.

        On a terminal it is the live line, elsewhere a line every 30 s.
        """
        text = printable(text)
        if rank != 0 or self.console == "none" or not text.strip():
            return
        if self._err.terminal:
            self._bar = text
            self._err.write(_ERASE + self._line())
        elif time.monotonic() - self._shown >= _QUIET:
            self._shown = time.monotonic()
            self._print(self._out, _from_rank(rank, text, self._out.colors))

    def tick(self) -> None:
        """A moment has passed."""
        self._lines(self._held.due(time.monotonic()))

    def event(self, event: Event) -> None:
        """What an event means to a person, if anything."""
        match event:
            case DecisionMade(action=action) if action not in _LAST:
                self._show_failed()
            case AttemptEnded():
                self._bar = ""
                self._lines(self._held.all())
            case PartFailed():
                if self._failed_saves.again(event):
                    return
            case Committed():
                if more := self._failed_saves.over():
                    self.note(more)
        text = sentence(event)
        if text is None:
            return
        color = _MOODS.get(event.event, "") if self._err.colors else ""
        for line in text.split("\n"):
            mood = color
            if self._err.colors and isinstance(event, GatePassed):
                mood = _GREEN if " accepted " in line else _RED
            line = printable(line)
            self._print(self._err, f"autoglm: {mood}{line}{_RESET if mood else ''}\n")

    def note(self, text: str) -> None:
        """A sentence that is no event."""
        for line in text.splitlines():
            self._print(self._err, f"autoglm: {printable(line)}\n")

    def traceback(self, rank: int, text: str) -> None:
        """What the first rank to fail recorded: shown when it is known whether the run goes on.

        If it does not, `last` shows it.
        """
        left, raised = self._held.without(text)
        self._lines(left)
        self._failed = rank, text, [other for other in raised if other != rank]

    def last(self) -> None:
        """Show what people are to find at the end: why the run has failed."""
        self._seen = ""
        self._show_failed()

    def _show_failed(self) -> None:
        if self._failed is None:
            return
        (rank, text, others), self._failed = self._failed, None
        if text == self._seen:
            self._print(self._err, f"autoglm: rank {rank} failed first, with the same traceback\n")
            return
        self._seen = text
        logs = f"; what {_ranks(others)} raised is in the logs" if others else ""
        self._print(self._err, f"autoglm: rank {rank} failed first{logs}:\n")
        for line in text.rstrip("\n").split("\n"):
            self._print(self._err, _from_rank(rank, line, self._err.colors))

    def status(
        self,
        step: int,
        rate: float | None = None,
        loss: float | None = None,
        last_checkpoint: int | None = None,
        attempt: int = 0,
        total: int | None = None,
    ) -> None:
        """Where training is: completed steps (-1 before the first), steps per second.

        On a terminal one live line, elsewhere a line every 30 s.
        """
        parts = ["starting" if step < 0 else f"step {step}" + (f"/{total}" if total else "")]
        if loss is not None and not math.isnan(loss):
            parts.append(f"loss {loss:.4g}")
        if rate:
            parts.append(f"{rate:.3g} steps/s" if rate >= 0.1 else f"{1 / rate:.0f} s/step")
        if last_checkpoint:
            parts.append(f"checkpoint step {last_checkpoint}")
        if attempt:
            parts.append(f"attempt {attempt}")
        text = " · ".join(parts)
        if self._err.terminal:
            self._status = text
            self._err.write(_ERASE + self._line())
        elif time.monotonic() - self._shown >= _QUIET:
            self._shown = time.monotonic()
            self._err.write(f"autoglm: {text}\n")

    def close(self) -> None:
        """Remove the live line; what follows is printed as usual."""
        self._lines(self._held.all())
        if self._status or self._bar:
            self._err.write(_ERASE)
            self._status = self._bar = ""
        if more := self._failed_saves.over():
            self.note(more)

    def _lines(self, lines: Lines) -> None:
        for rank, line in lines:
            self._print(self._out, _from_rank(rank, line, self._out.colors))

    def _line(self) -> str:
        text = (self._bar or f"autoglm: {self._status}")[: self._err.columns - 1]
        return f"{_DIM}{text}{_RESET}" if self._err.colors else text

    def _print(self, sink: Sink, text: str) -> None:
        if not (self._status or self._bar):
            sink.write(text)
        elif sink is self._err:
            sink.write(_ERASE + text + self._line())
        elif sink.terminal:
            self._err.write(_ERASE)
            sink.write(text)
            self._err.write(self._line())
        else:
            sink.write(text)


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    first = ", ".join(map(str, ranks[:_NAMED]))
    more = len(ranks) - _NAMED
    return f"ranks {first} and {more} more" if more > 0 else f"ranks {first}"


def _from_rank(rank: int, text: str, colors: bool) -> str:
    prefix = f"[rank {rank}]"
    if colors:
        prefix = f"{_RANKS[rank % len(_RANKS)]}{prefix}{_RESET}"
    return f"{prefix} {printable(text, colors=colors)}\n"
