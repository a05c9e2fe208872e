"""The supervisor's event loop: it waits for descriptors, signals and deadlines; no sleeps."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol


class HasFileno(Protocol):
    """Anything to wait for."""

    def fileno(self) -> int: ...


class EventLoop:
    """Calls a handler when its descriptor is readable, and timers when they fall due.

    The caller's own flow stays sequential: `while not done: loop.run(...)`.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: dict[Callable[[], None], tuple[float, float]] = {}

    def watch(self, source: int | HasFileno, handler: Callable[[], None]) -> None:
        """Call `handler` whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, handler)

    def forget(self, source: int | HasFileno) -> None:
        """Stop watching; harmless if it is not watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def every(self, seconds: float, timer: Callable[[], None]) -> None:
        """Call `timer` every `seconds` from now on."""
        self._timers[timer] = (seconds, time.monotonic() + seconds)

    def cancel(self, timer: Callable[[], None]) -> None:
        """Forget a timer."""
        self._timers.pop(timer, None)

    def run(self, until: float | None = None) -> None:
        """Wait for the next thing to happen, at most until monotonic time `until`; handle it."""
        due = min((at for _, at in self._timers.values()), default=None)
        deadlines = [at for at in (due, until) if at is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout):
            # An earlier handler of this round may have closed it.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        now = time.monotonic()
        for timer, (seconds, at) in list(self._timers.items()):
            if now >= at and timer in self._timers:
                self._timers[timer] = (seconds, now + seconds)
                timer()

    def wait(self, condition: Callable[[], bool], until: float | None = None) -> bool:
        """Run until `condition` holds or time `until` has come; whether it holds."""
        while not condition():
            if until is not None and time.monotonic() >= until:
                return False
            self.run(until)
        return True

    def close(self) -> None:
        """Release the selector."""
        self._selector.close()


class _Heirloom(NamedTuple):
    """What one listener leaves to the next: the signals not handled yet are in the sockets."""

    read: socket.socket
    write: socket.socket
    wakeup: int
    before: dict[signal.Signals, Any]


_left: list[_Heirloom] = []


class Signals:
    """Signals as readable events: handled in the loop, never in the middle of something."""

    def __init__(self, loop: EventLoop, numbers: Iterable[signal.Signals], handler: Any) -> None:
        self._loop = loop
        self._handler = handler
        handlers: dict[signal.Signals, Any] = {}
        if _left:
            self._read, self._write, self._wakeup, handlers = _left.pop()
        else:
            self._read, self._write = socket.socketpair()
            self._read.setblocking(False)
            self._write.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        # nohup ignores SIGHUP for its children, and means it.
        self._numbers = frozenset(n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN)
        before = {n: signal.signal(n, lambda *_: None) for n in self._numbers}
        self._before = {n: handlers.get(n, handler) for n, handler in before.items()}
        loop.watch(self._read, self._readable)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._read.recv(4096):
                if number in self._numbers:
                    self._handler(signal.Signals(number))

    def hand_over(self, unheeded: Iterable[signal.Signals] = ()) -> None:
        """Stop listening, and leave what comes until then to the next who does.

        So are those that were handled, but that nobody has acted on.
        """
        self._loop.forget(self._read)
        with contextlib.suppress(BlockingIOError):  # full of others: one of them will do
            self._write.send(bytes(unheeded))
        _left.append(_Heirloom(self._read, self._write, self._wakeup, self._before))

    def close(self) -> None:
        """Stop listening. Ctrl-C is given back; the others are ignored from here on.

        They asked for an end that has come: a scheduler that repeats its SIGTERM must not replace
        the exit code that says how.
        """
        for number, before in self._before.items():
            signal.signal(number, before if number == signal.SIGINT else signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup)
        self._loop.forget(self._read)
        self._read.close()
        self._write.close()
