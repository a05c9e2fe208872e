"""Asking a supervisor to save and go on, and waiting until it has."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoglm_resume import events, files
from autoglm_resume.control.asking import just_starting, send, supervisor
from autoglm_resume.errors import AutoglmError
from autoglm_resume.events import Event
from autoglm_resume.journal import decode
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.locks import Holder
from autoglm_resume.observe.progress import Waiting
from autoglm_resume.observe.pure.say import short
from autoglm_resume.observe.pure.segments import step_of
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.stops import SAVE

_OVER: dict[type[Event], str] = {
    events.AttemptStarted: "the ranks were restarted before it was saved",
    events.RunCompleted: "the run was complete before it was saved",
    events.RunInterrupted: "the run was stopped before it was saved",
    events.RunFailed: "the run failed before it was saved",
}


@dataclass
class Request:
    """What a journal says, event by event, about a save that was asked for."""

    step: int | None = None
    """What the ranks agreed to save after, None before they have."""
    saved: events.Committed | None = None
    """The commit that answers it."""
    problem: str = ""
    """Why it never will be, empty while it may."""

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.saved is not None or bool(self.problem)

    def hear(self, event: Event) -> None:
        """Take in the next event of the journal."""
        if self.settled:
            return
        step = step_of(event)
        reached = self.step is not None and step is not None and step >= self.step
        match event:
            case events.SaveRequested(reason=reason):
                # Said once more, for a later step, where a rank was faster than the announcement.
                self.step = step
                if step is None:
                    self.problem = reason or "the ranks cannot save now"
            case events.Committed() if reached:
                self.saved = event
            case events.PartFailed(rank=rank, reason=reason) if reached:
                who = "?" if rank is None else rank
                self.problem = f"rank {who} could not save step {step}: {reason}"
            # A restart out of memory goes on with writing what it started from.
            case events.AttemptStarted() if reached:
                pass
            case _:
                self.problem = _OVER.get(type(event), "")


def save(run: RunDirectory, holder: Holder) -> events.Committed:
    """Ask the supervisor `holder` to save, and return the `committed` event when it is.

    Raises UsageError if it is on another host, AutoglmError if it cannot save now.
    """
    request = Request()
    with supervisor(run, holder, "save") as process:
        if process is None:
            raise AutoglmError(f"{run.path}: its supervisor has just ended")
        if not _catches(holder.pid, SAVE):
            raise just_starting(run)  # as long as it does not, the signal would end it
        _ask(run, process, request)
    if request.saved is not None:
        return request.saved
    reason = request.problem or "its supervisor ended before it was saved"
    raise AutoglmError(f"{run.path}: not saved: {short(reason)}")


def _ask(run: RunDirectory, process: int, request: Request) -> None:
    """Send the signal, and return when `request` is settled or the supervisor has ended."""
    with contextlib.closing(DirectoryWatch()) as watch, Waiting("saving") as waiting:
        watch.add(run.path)
        journal = _Growing(run.journal)
        send(process, SAVE)
        over = False
        while not over and not request.settled:
            waiting.until(process, watch)
            # Asked before the last read: what was written until then is read.
            over = bool(select.select([process], [], [], 0)[0])
            for _ in watch.changed():
                pass
            for event in journal.events():
                request.hear(event)
            waiting.now("saving" if request.step is None else f"saving step {request.step}")


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


class _Growing:
    """The journal from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = path.stat().st_size

    def events(self) -> Iterable[Event]:
        """What was added since the last call, in whole lines."""
        with files.reading(self._path) as file:
            file.seek(self._end)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._end += len(lines) + len(newline)
        return decode(lines)
