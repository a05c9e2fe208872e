"""The runs of this user, wherever they lie: how each is, at a glance."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import journal
from autoglm_resume.locks import Holder
from autoglm_resume.observe.pure.goodput import summarize
from autoglm_resume.observe.status import UNREADABLE
from autoglm_resume.observe.tables import Table, width
from autoglm_resume.protocol.heartbeats import Board
from autoglm_resume.supervise.base import bounded, run_list
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.run_list import ListedRun

END = 1 << 18
"""Bytes of the end of a journal that are read: it may be as long as the training."""
SILENT = "no answer"
"""State of a run whose directory is on storage that does not answer."""
_STYLES = {
    **dict.fromkeys(("failed", "dead", UNREADABLE), "red"),
    **dict.fromkeys(("paused", SILENT), "yellow"),
}


@dataclass(frozen=True)
class Glance:
    """One run, now."""

    run: ListedRun
    state: str
    step: int | None
    """Completed steps, None where they are not known."""


def look() -> list[Glance]:
    """Look at every run on the list, the last started first; one that is gone leaves the list."""
    listed = run_list.read()
    answers = bounded.ask(lambda run: _glance(RunDirectory(run.path)), listed)
    found = []
    for number, run in enumerate(listed):
        state, step = answers.get(number, (SILENT, None))
        if state is None:
            run_list.forget(run)
        else:
            found.append(Glance(run, state, step))
    return found


def _glance(run: RunDirectory) -> tuple[str | None, int | None]:
    """(state, completed steps); no state if the run is gone."""
    try:
        if not run.exists:
            return None, None
        holder = run.holder()
        events, whole = journal.read_end(run.journal, END)
    except OSError:
        return UNREADABLE, None
    summary = summarize(events, alive=holder is not None)
    known = (_live_step(holder), summary.step, summary.checkpoint_step)
    step = next((step for step in known if step is not None), None)
    if holder is not None and not whole and not summary.attempts:
        # The attempt began further back than was read: since then it has trained and saved.
        return "training", step
    return summary.state, step


def _live_step(holder: Holder | None) -> int | None:
    """Of the heartbeats, if they are here."""
    if holder is None or not holder.board or holder.host != socket.gethostname():
        return None
    with contextlib.suppress(OSError, ValueError, OverflowError):
        board = Board.look(Path(holder.board))
        try:
            return max((beat.step for beat in board.beats() if beat.step >= 0), default=None)
        finally:
            board.close()
    return None


def to_json(found: Sequence[Glance]) -> list[dict[str, Any]]:
    """Every figure; `started` in Unix seconds."""
    return [
        {
            "name": one.run.name,
            "state": one.state,
            "step": one.step,
            "started": one.run.started,
            "started_from": str(one.run.started_from),
            "run": str(one.run.path),
        }
        for one in found
    ]


def show(found: Sequence[Glance]) -> None:
    """One line per run, on standard output."""
    table = Table(("run", "state", "step", "started", "directory"), right=frozenset((2,)))
    for one in found:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.run.started))
        style = _STYLES.get(one.state, "")
        name, path = _text(one.run.name), _text(one.run.path)
        table.add(name, one.state, one.step, started, path, style=style)
    columns = width(sys.stdout)
    if columns is not None and not table.fits(columns):
        table = table.only(0, 1, 2, 4)
    table.print(sys.stdout)


def _text(name: str | Path) -> str:
    """Whatever bytes somebody's file system has taken for a name."""
    return os.fsencode(name).decode("utf-8", "replace")
