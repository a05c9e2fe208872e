"""How a run is doing: what its journal says, and the last heartbeat of every rank."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import events, output
from autoglm_resume.errors import AutoglmError
from autoglm_resume.events import Event
from autoglm_resume.job.units import parse_duration
from autoglm_resume.locks import Holder
from autoglm_resume.observe import report
from autoglm_resume.observe.pure import replicas
from autoglm_resume.observe.pure.explain import reason
from autoglm_resume.observe.pure.goodput import Summary, summarize
from autoglm_resume.observe.pure.replicas import Replica
from autoglm_resume.observe.pure.say import brief, plural, seconds, slurm_job
from autoglm_resume.observe.tables import Table, width
from autoglm_resume.protocol.heartbeats import Board
from autoglm_resume.protocol.silences import merged
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.core.history import Silences, recall
from autoglm_resume.supervise.core.liveness import Limits, Look, health, silence

SLURM = ("job", "restarts", "node")
UNREADABLE = "unreadable"
"""State of a run of which nothing can be told."""


@dataclass(frozen=True)
class Rank:
    """The last sign of progress of a rank."""

    rank: int
    pid: int
    step: int
    """Completed steps, -1 before it knows where it starts."""
    phase: str
    age: float | None
    """Seconds since that beat, None if there was none yet."""
    loss: float | None
    health: float = 1.0
    """From 1, it beats as ever, to 0, it counts as hung."""


@dataclass(frozen=True)
class Status:
    """One run, now."""

    run: Path
    summary: Summary
    holder: Holder | None
    """The supervisor that has it."""
    ranks: tuple[Rank, ...]
    """None of them if there is no supervisor, or it is on another host or of another user."""
    replicas: tuple[Replica, ...] = ()
    """In the order of the job."""
    slurm: events.Slurm | None = None
    """The job of Slurm that the newest supervisor was in."""

    @property
    def step(self) -> int | None:
        """Completed steps: of the heartbeats if there are any."""
        live = [rank.step for rank in self.ranks if rank.step >= 0]
        return max(live) if live else self.summary.step


def of(run: RunDirectory) -> Status:
    """Look at one run."""
    holder = run.holder()
    here = holder is not None and holder.host == socket.gethostname()
    now = time.monotonic() if here else None
    journal = run.events()
    summary = summarize(journal, alive=holder is not None, now=now)
    targets = run.section("checkpoint").get("replicas")
    targets = [each for each in targets if isinstance(each, str)] if type(targets) is list else []
    return Status(
        run.path,
        summary,
        holder,
        _ranks(holder, recall(journal).silences, _limits(run.section("heartbeat")))
        if here and holder
        else (),
        replicas.of(journal, targets) if targets else (),
        _slurm(journal),
    )


@dataclass(frozen=True)
class Unreadable:
    """A run of which nothing can be told, and why."""

    run: Path
    reason: str


def of_all(runs: Iterable[RunDirectory]) -> list[Status | Unreadable]:
    """Look at each; one that cannot be read hides no other."""
    found: list[Status | Unreadable] = []
    for run in runs:
        try:
            found.append(of(run))
        except AutoglmError as error:
            found.append(Unreadable(run.path, error.message))
        except OSError as error:
            found.append(Unreadable(run.path, f"{error.filename or run.path}: {error.strerror}"))
    return found


def _slurm(journal: Sequence[Event]) -> events.Slurm | None:
    for event in reversed(journal):
        match event:
            case events.Slurm():
                return event
            case events.SupervisorStarted():
                return None
    return None


def _ranks(holder: Holder, past: Silences, limits: Limits) -> tuple[Rank, ...]:
    if not holder.board:
        return ()
    try:
        board = Board.look(Path(holder.board))
        beats = board.beats()
    except (OSError, ValueError, OverflowError):
        return ()
    try:
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        now = time.monotonic()
        return tuple(
            _rank(rank, Look(beat, merged([past.get(rank, {}), gaps.all()])), now, limits, load)
            for rank, (beat, gaps) in enumerate(zip(beats, board.silences, strict=True))
        )
    finally:
        board.close()


def _rank(rank: int, look: Look, now: float, limits: Limits, load: float) -> Rank:
    beat = look.beat
    age = silence(beat, now) if beat.time else None
    loss = beat.loss if beat.loss == beat.loss else None
    sound = health(look, now, limits, load)
    return Rank(rank, beat.pid, beat.step, beat.phase.label, age, loss, sound)


def _limits(asked: Mapping[str, Any]) -> Limits:
    try:
        found = parse_duration(asked["timeout"]), parse_duration(asked["startup"])
    except (KeyError, ValueError, TypeError):
        return Limits(math.inf, math.inf)  # a job of another version
    return Limits(*found)


def to_json(status: Status | Unreadable) -> dict[str, Any]:
    """Every figure; durations in seconds."""
    if isinstance(status, Unreadable):
        return {"run": str(status.run), "state": UNREADABLE, "reason": status.reason}
    return {
        "run": str(status.run),
        "supervisor": asdict(status.holder) if status.holder else None,
        "slurm": status.slurm and {key: vars(status.slurm)[key] for key in SLURM},
        "ranks": [asdict(rank) for rank in status.ranks],
        "replicas": [asdict(replica) for replica in status.replicas],
        **report.to_json(status.summary),
        "step": status.step,
    }


def show(status: Status) -> None:
    """One run, on standard output."""
    holder = status.holder
    facts = Table()
    facts.add("run", status.run)
    if holder is not None:
        facts.add("supervisor", f"process {holder.pid} on {holder.host}")
    if status.slurm is not None:
        facts.add("slurm", slurm_job(status.slurm))
    facts.add("attempts", len(status.summary.attempts))
    facts.add("failures", _failures(status.summary))
    facts.rows += report.facts(status.summary, status.step).rows
    facts.print(sys.stdout)
    if status.ranks:
        output.show()
        _ranks_table(status.ranks).print(sys.stdout)
    if status.replicas:
        output.show()
        _replicas(status.replicas).print(sys.stdout)


def _failures(summary: Summary) -> str:
    ordered = sum(bool(recovery.drills) for recovery in summary.recoveries)
    drills = f", {ordered} of them ordered by drills" if ordered else ""
    last = summary.recoveries[-1] if summary.recoveries else None
    latest = f"; the last: {last.kind}, {brief(last.what)}" if last else ""
    return f"{len(summary.recoveries)}{drills}{latest}"


def _ranks_table(ranks: Sequence[Rank]) -> Table:
    headers = ("rank", "process", "step", "phase", "last beat", "health", "loss")
    table = Table(headers, frozenset((0, 1, 2, 5)))
    for rank in ranks:
        age = "" if rank.age is None else f"{seconds(rank.age)} ago"
        loss = None if rank.loss is None else f"{rank.loss:.4g}"
        step = rank.step if rank.step >= 0 else None
        style = "" if rank.health > 0.5 else "yellow" if rank.health > 0 else "red"
        sound = f"{rank.health:.0%}"
        table.add(rank.rank, rank.pid or None, step, rank.phase, age, sound, loss, style=style)
    return table


def show_all(found: Sequence[Status | Unreadable]) -> None:
    """One line per run, on standard output: done, training, or stopped for which reason."""
    table = Table(
        (
            *("run", "state", "step", "attempts", "failures", "last failure"),
            *("checkpoint", "elapsed", "goodput", "reason"),
        ),
        right=frozenset((2, 3, 4, 7, 8)),
    )
    for status in found:
        if isinstance(status, Unreadable):
            table.add(status.run.name, UNREADABLE, *[None] * 7, status.reason, style="red")
            continue
        summary = status.summary
        goodput = None if summary.goodput is None else f"{summary.goodput:.1%}"
        at = summary.checkpoint_step
        table.add(
            status.run.name,
            summary.state,
            status.step,
            len(summary.attempts),
            len(summary.recoveries),
            summary.recoveries[-1].kind if summary.recoveries else None,
            None if at is None else f"step {at}",
            seconds(summary.elapsed),
            goodput,
            brief(reason(summary)),
            style={"failed": "red", "dead": "red", "paused": "yellow"}.get(summary.state, ""),
        )
    columns = width(sys.stdout)
    if columns is not None and not table.fits(columns):
        table = table.only(0, 1, 2, 4, 5, 9)
    table.print(sys.stdout)


def _replicas(found: Iterable[Replica]) -> Table:
    """One line each."""
    table = Table(("replica", "newest there", "behind", "trouble"))
    for each in found:
        behind = plural(each.behind, "checkpoint") if each.behind else "no"
        style = "red" if each.error else ""
        table.add(each.target, each.newest, behind, each.error, style=style)
    return table
