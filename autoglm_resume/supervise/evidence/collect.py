"""Collects what failures are concluded from: what the ranks left, and what the machine says.

A source that cannot be asked here (no permission, no such kernel, no GPU) is None, which is not the
same as one that has nothing to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoglm_resume import events, files, linux
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Beat
from autoglm_resume.supervise.base.machine import within
from autoglm_resume.supervise.core.code_location import last_raised
from autoglm_resume.supervise.core.evidence import ErrorRecord, Machine, RankEvidence, Space
from autoglm_resume.supervise.core.failure import Failure
from autoglm_resume.supervise.core.patterns import notable
from autoglm_resume.supervise.evidence.gpus import Gpus
from autoglm_resume.supervise.evidence.oom import counters, rise
from autoglm_resume.supervise.ranks.group import AGENT, Exit
from autoglm_resume.supervise.ranks.observed import Observed
from autoglm_resume.supervise.ranks.script_ends import ScriptEnds
from autoglm_resume.supervise.ranks.torchrun import torchrun_exits, torchrun_log

LOG_BYTES = 1 << 16
"""Of the end of a log, which may be a gigabyte: stacks that a dying process prints fit in."""
ERROR_BYTES = 1 << 20
KERNEL_LINES = 100
NOWHERE = -1
PATIENCE = 1.0
"""Seconds for a file system or a driver to answer: one that is broken may never."""


class KernelLog:
    """What the kernel logs from now on."""

    def __init__(self, path: Path = Path("/dev/kmsg")) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> tuple[str, ...] | None:
        """The newest lines that can bear on the end of a rank; None if they cannot be read."""
        if self._fd is None:
            return None
        found: list[str] = []
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue  # the kernel has overwritten what came next: go on with what is left
            except OSError:
                break
            if not record:
                break
            # “level,number,microseconds,flags;text”, then lines of keys and values.
            line = record.split(b"\n", 1)[0].partition(b";")[2].decode(errors="replace")
            if notable(line):
                found.append(line)
        return tuple(found[-KERNEL_LINES:])

    def close(self) -> None:
        """Release the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Witness:
    """Watches the machine during an attempt: make it once the processes `pids` run."""

    def __init__(self, pids: Iterable[int], directories: Sequence[Path]) -> None:
        """`directories` are where the ranks write."""
        self._directories = directories
        self._kernel = KernelLog()
        self._counters = counters([os.getpid(), *pids])
        self._gpus = Gpus()

    def machine(self) -> Machine:
        """What it says about the time since."""
        places = (*self._directories, Path("/dev/shm"))
        return Machine(
            rise(self._counters),
            self._kernel.lines(),
            within(PATIENCE, self._gpus.since),
            tuple(space for path in places if (space := _space(path)) is not None),
        )

    def close(self) -> None:
        """Stop watching."""
        self._kernel.close()
        self._gpus.close()


def gather(
    task: Assignment,
    pids: Mapping[int, int],
    exits: Mapping[int, Exit],
    beats: Sequence[Beat],
    seen: Observed,
    ends: ScriptEnds,
) -> list[RankEvidence]:
    """What the ranks of a group that is down, `pids` and `exits` by rank, have left."""
    torchrun = torchrun_exits(task) if AGENT in pids else {}
    broken = min((how.mono for how in exits.values() if not how.by_us), default=float("-inf"))
    found = []
    for rank, beat in enumerate(beats):
        how = exits.get(rank)
        code, number = (how.code, how.signal) if how else (None, None)
        if rank in ends.stuck:
            code, number = ends.codes[rank], None
        if how is not None and code is None and number is None:
            code = ends.codes.get(rank, torchrun.get(pids[rank]))
            if code is not None and code < 0:
                number, code = -code, None
        error = _error(task, rank)
        by_us = how.by_us if how else False
        raised = error is not None and error.mono <= max(broken, seen.broken_at or broken)
        if by_us and (raised or ends.failed_before(rank, seen.broken_at)):
            # It failed before any other, but its process was slow to end.
            by_us, code, number = False, ends.codes.get(rank, 1), None
        evidence = RankEvidence(
            rank,
            code,
            number,
            order=how.order if how else 0,
            ended=how.mono if how else float("inf"),
            by_us=by_us,
            beat=beat,
            error=error,
            refusal=seen.refusals.get(rank),
            state=seen.states.get(rank, ""),
            stack=seen.stacks.get(rank, ()),
            pid=pids.get(rank),
        )
        found.append(evidence)
    return [_with_log(task, _ended_by_agent(rank, found, AGENT in pids)) for rank in found]


def described(
    failure: Failure, ranks: Sequence[RankEvidence], seen: Observed, lived: float | None
) -> events.GroupFailed:
    """A failure and what it was concluded from, for the journal."""
    return events.GroupFailed(
        mono=seen.broken_at,
        kind=failure.kind.value,
        root_rank=failure.rank,
        summary=failure.summary,
        ranks=tuple(
            events.RankExit(
                rank=rank.rank,
                code=rank.code,
                signal=rank.signal,
                by_us=rank.by_us,
                step=rank.beat.step,
                phase=rank.beat.phase.label,
            )
            for rank in ranks
        ),
        traceback=failure.traceback,
        cause_mono=failure.cause_mono,
        refused=failure.refused,
        stacks=seen.stacks,
        step=failure.step,
        place=failure.place,
        evidence=failure.evidence,
        tail=failure.tail,
        lived=lived,
    )


def agent_said(task: Assignment, exits: Mapping[int, Exit]) -> str:
    """What torchrun has to say when no rank of its own was seen to fail."""
    how = exits.get(AGENT)
    if how is None or not how.code:
        return ""
    last = read_end(torchrun_log(task), LOG_BYTES).strip().splitlines()[-1:]
    said = f"torchrun exited with code {how.code}"
    return f"{said}: {last[0]}" if last else said


def read_end(path: Path, most: int) -> str:
    """The last `most` bytes of a file, from the first whole line on; empty if there is none."""
    try:
        with files.reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most))
            data = file.read(most)
    except OSError:
        return ""
    if size > most:
        data = data.partition(b"\n")[2] or data
    return data.decode(errors="replace")


def _with_log(task: Assignment, rank: RankEvidence) -> RankEvidence:
    if not (rank.failed or rank.state):
        return rank
    log = read_end(task.log(rank.rank), LOG_BYTES)
    error = rank.error
    if error is None and rank.code == 1 and (raised := last_raised(log)) is not None:
        # Python ends like this. Without a file descriptor left, for one, it has no other way.
        error = ErrorRecord(*raised, rank.ended)
    return replace(rank, log=log, error=error)


def _ended_by_agent(
    rank: RankEvidence, ranks: Sequence[RankEvidence], torchrun: bool
) -> RankEvidence:
    # torchrun ends the others when one has failed, and it is ours: nobody outside sent that.
    if not torchrun or rank.signal not in (signal.SIGTERM, signal.SIGKILL):
        return rank
    earlier = any(other.failed and other.order < rank.order for other in ranks)
    return replace(rank, by_us=True) if earlier else rank


def _space(path: Path) -> Space | None:
    """What is free at `path`, None if there is no such place."""

    def ask() -> int | None:
        with contextlib.suppress(OSError):
            if path.exists():
                return linux.free_bytes(path)
        return NOWHERE

    free = within(PATIENCE, ask)
    return None if free == NOWHERE else Space(str(path), free)


def _error(task: Assignment, rank: int) -> ErrorRecord | None:
    """The exception that ended a rank: as our own code wrote it, or torch's `record`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        record = _object(task.error(rank))
        return ErrorRecord(
            str(record["type"]),
            str(record["message"]),
            str(record["traceback"]),
            float(record["mono"]),
            record.get("misused") is True,
            str(record.get("hint", "")),
        )
    path = Path(task.rank_environment(rank)["TORCHELASTIC_ERROR_FILE"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        message = _object(path)["message"]
        type, _, text = str(message["message"]).partition(": ")
        trace = str(message["extraInfo"]["py_callstack"])
        # Its own timestamp has whole seconds only.
        age = time.time() - path.stat().st_mtime
        return ErrorRecord(type, text, trace, time.monotonic() - age)
    return None


def _object(path: Path) -> dict[str, Any]:
    with files.reading(path) as file:
        found: dict[str, Any] = json.loads(file.read(ERROR_BYTES))
    return found
