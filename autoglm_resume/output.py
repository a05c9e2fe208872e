"""The one way this package prints, and what of other people's texts it prints.

Standard output and error may be closed, on a full disk, or a terminal or a reader that has left.
That costs what was to be shown, and never what is being done: no exception, and no exit code.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

PIECE = 4096
"""Bytes that a pipe takes without blocking when poll says it is writable (PIPE_BUF)."""
PATIENCE = 10.0
"""Seconds without a reader after which a process that should end goes on without one."""
_LEFT = frozenset((errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO))
"""Nobody reads it any more, which is no fault of anybody's."""

_COLORS = re.compile(r"\x1b\[[0-9;:]*m")
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]?"  # cursor movement and the like
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links, device strings
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f"
    r"\u2028\u2029"  # ends of lines and paragraphs
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions: what is read is not what is there
    r"\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200d\u2060-\u2065\u206a-\u206f\u3164\ufeff"
    r"\ufff9-\ufffb\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"  # unseen
)
_RESET = "\x1b[0m"


class Lossy(io.RawIOBase):
    """A descriptor to print on: what cannot be written is lost."""

    def __init__(self, fd: int, *, noting: bool = False) -> None:
        """`noting`: say there, once that is possible again, how much was lost."""
        self._fd = fd
        self._noting = noting
        self._missing = 0
        self.failure: OSError | None = None
        """The last."""
        self.patience: float | None = None
        """Seconds to wait for a reader who does not read; None: for as long as it takes."""

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self._missing and self._noting:
            note = f"\nautoglm: {self._missing} bytes of output were lost here ({self.failure})\n"
            if _written(self._fd, note.encode(), self.patience) is None:
                self._missing = 0
        failure = _written(self._fd, data, self.patience)
        if failure is not None:
            self.failure = failure
            self._missing += size
        return size


def begin(*, noting: bool = False) -> None:
    """The first thing that a process of ours does, before it opens anything."""
    fill_descriptors()
    # Of a terminal with `stty tostop`: a run in the background would stop at its next line.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    sys.stdout = sys.__stdout__ = _stream(1, sys.stdout, noting)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, sys.stderr, noting)  # type: ignore[misc]


def fill_descriptors() -> None:
    """Open /dev/null where standard input, output or error is closed.

    Whatever is opened next would have its number, and get what was meant for a terminal.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)


def _stream(fd: int, before: TextIO | None, noting: bool) -> io.TextIOWrapper:
    raw = Lossy(fd, noting=noting)
    unbuffered = bool(getattr(before, "write_through", False))  # python -u
    buffer = cast(io.BufferedWriter, raw) if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        write_through=unbuffered,
        encoding=getattr(before, "encoding", None) or "utf-8",
        # What the locale cannot spell, a file name that is no text for one, is shown all the same.
        errors="backslashreplace",
        line_buffering=fd == 2 or raw.isatty(),
    )


def _lossy(stream: TextIO | None) -> Lossy | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, Lossy) else None


def _written(fd: int, data: Any, patience: float | None) -> OSError | None:
    """Write all of `data`; returns why that could not be done."""
    left = memoryview(data).cast("B")
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    while left:
        try:
            if patience is not None and not ready.poll(patience * 1000):
                return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            left = left[os.write(fd, left if patience is None else left[:PIECE]) :]
        except BlockingIOError:  # others may have made a pipe or terminal that we share so
            if not ready.poll(None if patience is None else patience * 1000):
                return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            return error
    return None


def show(text: str = "") -> None:
    """Lines on standard output."""
    with suppress(ValueError):  # it was closed
        sys.stdout.write(f"{lines(text)}\n")


def verbatim(text: str) -> None:
    """A file on standard output: byte by byte, unless a person reads it there."""
    for_person = sys.stdout.isatty()
    sys.stdout.write("\n".join(map(printable, text.split("\n"))) if for_person else text)


def document(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")  # ASCII, so nothing in it can do anything


def say(text: str) -> None:
    """Lines on standard error, in a script's process too, or nothing where nobody can read them."""
    said = f"autoglm: {lines(text)}\n"
    stream = sys.stderr
    try:
        fd = stream.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or something that is no file
        with suppress(Exception):
            stream.write(said)
        return
    with suppress(Exception):
        stream.flush()
    # Not through its buffer: what cannot be written would stay there, and Python, which tries again
    # at its end, would then exit with 120.
    _written(fd, said.encode("utf-8", "backslashreplace"), PATIENCE)


def ask(question: str) -> bool | None:
    """Whether the person at the terminal says yes; None where nobody can be asked."""
    try:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return None
        _written(sys.stderr.fileno(), f"{lines(question)} [y/N] ".encode(), PATIENCE)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except (AttributeError, OSError, ValueError):  # closed, or something that is no file
        return None


def command(*words: object) -> str:
    """The command line `autoglm WORDS`, to be pasted into a shell."""
    return shlex.join(["autoglm", *map(str, words)])


def near(path: Path) -> Path:
    """As short as it can be typed from here."""
    with suppress(FileNotFoundError):  # the working directory itself is gone
        return path.relative_to(cwd) if path.is_relative_to(cwd := Path.cwd()) else path
    return path


def flush() -> None:
    """Write what was printed; what cannot be written is given up.

    Where it stayed in a buffer, Python would exit with 120 instead of the code that says how.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(Exception), open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), stream.fileno())
                stream.flush()
        except (AttributeError, ValueError):  # there is none, or it was closed
            pass


def hurry() -> None:
    """From here on, wait only so long for a reader who does not read: the process is to end."""
    for stream in (sys.stdout, sys.stderr):
        if (raw := _lossy(stream)) is not None:
            raw.patience = PATIENCE


def lost() -> str:
    """Why something is missing on standard output; empty if nothing is, or if nobody wants it."""
    raw = _lossy(sys.stdout)
    if raw is None or raw.failure is None or raw.failure.errno in _LEFT:
        return ""
    return raw.failure.strerror or str(raw.failure)


def unread() -> bool:
    """Whether the reader of standard output has left."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    raw = _lossy(sys.stdout)
    failed = raw is not None and raw.failure is not None and raw.failure.errno in _LEFT
    return failed or bool(poll.poll(0))


def lines(text: str) -> str:
    """Text that may have several lines, safe on a terminal."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str | bytes, *, colors: bool = False) -> str:
    """One line of anybody's text, safe on a terminal: of the control sequences, colours remain.

    What turns the direction of text, and what is not to be seen, is left out, too. Of what was
    overwritten with carriage returns (progress bars), the last state is shown.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = text.rstrip("\r\n")
    if "\r" in text:
        text = next((part for part in reversed(text.split("\r")) if part.strip()), "")
    if text.isascii() and text.isprintable():
        return text
    kept = _COLORS.findall(text) if colors else []
    plain = [_CONTROLS.sub("", _ESCAPES.sub("", part)) for part in _COLORS.split(text)]
    if not kept:
        return "".join(plain)
    colored = "".join(p + c for p, c in zip(plain, [*kept, ""], strict=True))
    return colored + _RESET
