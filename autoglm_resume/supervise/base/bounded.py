"""Questions to storage that may never answer, asked by a child process for a bounded time.

Whoever touches a mount that is dead hangs in the kernel, where nothing ends it. A thread would not
do: no process ends before all of its threads have.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds without any answer after which none is waited for."""

_hung: set[int] = set()


def hung() -> frozenset[int]:
    """Children that the kernel has not let go of when last looked: nobody may wait for them."""
    for pid in list(_hung):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _hung.discard(pid)
    return frozenset(_hung)


def ask(
    question: Callable[[T], Any], about: Sequence[T], patience: float = PATIENCE
) -> dict[int, Any]:
    """What `question` returns about each, by its place in `about`, as JSON has it.

    All are asked at once. Of what raised, or did not answer, there is nothing. Raises OSError where
    there can be no child.
    """
    if not about:
        return {}
    answers, write = os.pipe()
    with os.fdopen(answers, "rb", 0) as told, os.fdopen(write, "wb", 0) as ours:
        pid = os.fork()
        if pid == 0:
            _answer_all(question, about, write)
        ours.close()
        said, piece = b"", b"-"
        while piece and select.select([told], [], [], patience)[0]:
            piece = told.read(1 << 16)
            said += piece
    if piece:
        os.kill(pid, signal.SIGKILL)  # in vain while the kernel has it, and nobody waits for that
        _hung.add(pid)
    else:
        os.waitpid(pid, 0)
    return dict(json.loads(line) for line in said.splitlines(keepends=True) if line[-1:] == b"\n")


def _answer_all(question: Callable[[T], Any], about: Sequence[T], fd: int) -> NoReturn:
    """Be the child."""
    turn = threading.Lock()

    def answer(number: int, each: T) -> None:
        with suppress(Exception):
            line = json.dumps([number, question(each)]).encode() + b"\n"
            with turn:
                while line:
                    line = line[os.write(fd, line) :]

    try:
        # It may outlive its parent, and must not keep alive what that held: a lock, a pipe's end.
        for other in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            if other != fd:
                with suppress(OSError):
                    os.close(other)
        threads = [threading.Thread(target=answer, args=pair) for pair in enumerate(about)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(0)
