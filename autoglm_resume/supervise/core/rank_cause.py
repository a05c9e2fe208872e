"""Why one rank ended, seen by itself: from its evidence and what the machine says. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from autoglm_resume.failures import Kind
from autoglm_resume.supervise.core import patterns
from autoglm_resume.supervise.core.evidence import (
    ErrorRecord,
    Machine,
    RankEvidence,
    signal_name,
    tail,
)

_OWN = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that a process brings upon itself."""
_POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals by which schedulers ask for an end; nothing else in a training sends them."""
FULL = 1 << 20
"""Bytes; a file system with less has no room for anything that matters."""


@dataclass(frozen=True)
class Cause:
    """Why one rank ended, seen by itself."""

    kind: Kind
    what: str
    """As in “rank 1 …”."""
    means: str = ""
    tier: int = 0
    """0 if it failed by itself, 1 if that is not certain, 2 if ranks end like this when another
    one has failed."""
    evidence: tuple[str, ...] = ()


def cause_of(rank: RankEvidence, machine: Machine) -> Cause:
    if rank.signal is not None:
        cause = _by_signal(rank, rank.signal, machine)
    elif rank.error is not None:
        cause = _by_exception(rank, rank.error, machine)
    else:
        cause = _by_code(rank)
    for line in machine.kernel or ():
        found = patterns.xid(line)
        if found is not None and found.pid is not None and found.pid == rank.pid:
            return replace(cause, kind=Kind.GPU_FAULT, tier=0)
    return cause


def _by_signal(rank: RankEvidence, number: int, machine: Machine) -> Cause:
    what = f"died by {signal_name(number)}"
    if number == signal.SIGKILL:
        if said := _oom(machine, rank.pid):
            return Cause(
                Kind.HOST_OOM, "was killed by the kernel for lack of memory", evidence=said
            )
        return Cause(Kind.KILLED, what, evidence=_unexplained(machine))
    if number in _POLITE:
        return Cause(Kind.PREEMPTED, f"was ended by {signal_name(number)} from outside")
    if number == signal.SIGBUS and (full := _full(machine, "/dev/shm")):
        return Cause(Kind.HOST_OOM, what, "shared memory (/dev/shm) is full", evidence=full)
    if number not in _OWN:
        return Cause(Kind.KILLED, what)
    said = tuple(
        f"the kernel's log: {line}"
        for line in machine.kernel or ()
        if rank.pid is not None and patterns.faulted(line) == rank.pid
    )
    if number != signal.SIGABRT:
        return Cause(Kind.CRASHED, what, evidence=said)
    # NCCL's watchdog and gloo abort a victim, and any C++ exception aborts: the log says which.
    found = patterns.in_log(rank.log, early=not rank.beat.first_step_time)
    if found is None:
        return Cause(Kind.CRASHED, what, tier=1, evidence=said)
    row, line = found
    kind = Kind.CRASHED if row.kind is Kind.EXCEPTION else row.kind
    return Cause(kind, what, row.means, _tier(row), (f"its log says: {_short(line)}",))


def _by_exception(rank: RankEvidence, error: ErrorRecord, machine: Machine) -> Cause:
    lines = error.message.strip().splitlines()
    what = f"failed with {error.type}" + (f": {_short(lines[0])}" if lines else "")
    if len(lines) > 1 and lines[0].startswith("Caught "):  # a worker's traceback is in between
        what += f" {_short(lines[-1])}"
    if error.misused:
        return Cause(Kind.USAGE_ERROR, f"was refused: {_short(lines[0])}" if lines else what)
    row = patterns.explain(
        error.type, error.message, error.traceback, early=not rank.beat.first_step_time
    )
    if row is None:
        return Cause(Kind.EXCEPTION, what, tier=1)
    kind = row.kind
    evidence: tuple[str, ...] = ()
    if kind is Kind.KILLED and (evidence := _oom(machine, None)):
        kind = Kind.HOST_OOM
    if kind is Kind.STORAGE and (evidence := _full(machine)):
        kind = Kind.DISK_FULL
    elif kind is Kind.DISK_FULL:
        evidence = _full(machine)
    return Cause(kind, what, row.means, _tier(row), evidence)


def _by_code(rank: RankEvidence) -> Cause:
    what = f"exited with code {rank.code}"
    if rank.code not in (1, 2):
        return Cause(Kind.EXITED, what)
    # Launchers and scripts that print what they catch: the last lines are all there is.
    found = patterns.in_log(tail(rank.log), early=not rank.beat.first_step_time)
    if found is None:
        return Cause(Kind.EXITED, what, tier=1 if rank.code == 1 else 0)
    row, line = found
    kind = Kind.EXITED if row.kind is Kind.EXCEPTION else row.kind
    return Cause(kind, what, row.means, _tier(row), (f"its log says: {_short(line)}",))


def _tier(row: patterns.Pattern) -> int:
    return 2 if row.victim else 0


def _oom(machine: Machine, pid: int | None) -> tuple[str, ...]:
    """What says that the kernel's OOM killer was at work, on process `pid` or on any."""
    killed = [(patterns.oom_victim(line), line) for line in machine.kernel or ()]
    said = [f"the kernel's log: {line}" for of, line in killed if of and pid in (None, of)]
    if machine.oom_kills:
        said.append(f"its cgroup's counter of OOM kills rose by {machine.oom_kills}")
    return tuple(said)


def _unexplained(machine: Machine) -> tuple[str, ...]:
    if machine.oom_kills is None and machine.kernel is None:
        return (
            "whether it was the kernel's OOM killer is not known: neither the kernel's log nor a "
            "cgroup's counter can be read here",
        )
    return ("it was not the kernel's OOM killer: something outside sent the signal",)


def _full(machine: Machine, *paths: str) -> tuple[str, ...]:
    """The file systems, among `paths` or of all, that have no room left."""
    return tuple(
        f"{space.path} has {space.free} bytes free"
        for space in machine.spaces
        if space.free is not None and space.free < FULL and (not paths or space.path in paths)
    )


def _short(text: str) -> str:
    return text[:300]
