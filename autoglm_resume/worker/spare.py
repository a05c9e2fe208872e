"""A spare: a rank's process before anybody knows which rank of which attempt it will be.

It imports what the script imports. Where the script is split (`launch(setup, train)`), it runs the
script up to there and `setup` as well. Then it waits for its rank, and goes on as if it had just
come so far.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from autoglm_resume import events, linux
from autoglm_resume.errors import UsageError
from autoglm_resume.protocol.assignment import Assignment, Source
from autoglm_resume.worker import ahead, environment_reads, imports, rank
from autoglm_resume.worker.base.event_log import EventLog

Ready = TypeVar("Ready")
Result = TypeVar("Result")

MESSAGE = 1 << 16

_waiting: Spare | None = None
"""This process, as long as it is one."""
staged = False
"""Whether this process's script called `launch`."""


def launch(setup: Callable[[], Ready], train: Callable[[Ready], Result]) -> Result:
    """`train(setup())`, with `setup` done ahead of time in warm spares (`spares` in the job file).

    `setup` builds what does not depend on the rank or on the checkpoint: the model on the CPU, a
    tokenizer, an index of the data. Neither it nor what the script does before may ask for the
    rank or begin a session: in a spare nobody knows the rank yet. Under torchrun or alone this is
    a plain call.
    """
    global staged
    staged = True
    ready = setup()
    if _waiting is not None:
        _waiting.wait()
    return train(ready)


def refuse_session() -> None:
    """Raise UsageError if this process is a spare: a session is of a rank."""
    if _waiting is not None:
        raise UsageError("autoglm.init() must come in train(), after autoglm.launch() has begun")


class Spare:
    """This process, while it is a spare. `link` leads to the supervisor."""

    def __init__(self, link: socket.socket, source: Source) -> None:
        self._link = link
        self._source = source
        self.identity: tuple[Assignment, int] | None = None

    def live(self, modules: Sequence[str], log: Path, *, split: bool) -> int:
        """The whole life, as a spare and then as a rank; returns the exit code.

        `split`: the script was seen to call `launch`, and may be run up to there.
        """
        global _waiting
        _waiting = self
        imports.begin()
        environment_reads.watch()
        ahead.keep(self._start_over)
        rank.detach(log, self._source.workdir)
        linux.set_group_nice(linux.GROUP_NICE)  # ranks train meanwhile
        try:
            if not split:
                self._prepare(modules)
                self.wait()
            code = rank.execute(self._source, self._record)
        except Gone:
            return 0
        except Exception as error:
            self._say(op="failed", reason=f"{type(error).__name__}: {error}")
            return 1
        if self.identity is None:
            self._say(op="failed", reason="the script ended without calling autoglm.launch()")
            return 1
        assignment, number = self.identity
        EventLog(assignment.events(number), number).emit(events.RankEnded(code=code))
        return code

    def wait(self) -> None:
        """Wait for a rank, and become it. Raises Gone if none comes any more."""
        global _waiting
        if name := environment_reads.read_of_rank():
            raise UsageError(f"{name} was asked for before autoglm.launch() has begun")
        linux.set_group_nice(0)
        self._say(op="ready", files=_own_files(self._source))
        message = self._link.recv(MESSAGE)
        self._link.close()
        if not message:
            raise Gone
        order = json.loads(message)
        assignment, number = Assignment.load(Path(order["assignment"])), int(order["rank"])
        _waiting, self.identity = None, (assignment, number)
        rank.assume(assignment, number, assignment.rank_environment(number))

    def _prepare(self, modules: Sequence[str]) -> None:
        """Import what belongs to the project itself, which the zygote does not keep."""
        sys.path.insert(0, rank.home_of(self._source))
        for name in modules:
            importlib.import_module(name)
        sys.path.pop(0)

    def _record(self, error: BaseException) -> None:
        if isinstance(error, Gone):
            raise error
        if self.identity is None:
            raise error
        rank.record(*self.identity, error)

    def _start_over(self, module: str, reason: str) -> None:
        if self.identity is None:
            raise UsageError(reason)
        rank.start_over(*self.identity, module, reason)

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self._link.send(json.dumps(message).encode())


class Gone(BaseException):
    """The supervisor has no use for this spare; no `except Exception` of a script may catch it."""


def _own_files(source: Source) -> dict[str, list[int]]:
    """Size and time of change of every file of the project that was read into this process."""
    names = [source.script, *imports.own_files()]
    found = {}
    for name in names:
        if name is not None:
            with contextlib.suppress(OSError):
                status = Path(name).stat()
                found[name] = [status.st_size, status.st_mtime_ns]
    return found
