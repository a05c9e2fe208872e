"""What happened to a worker group: from evidence to a class, a root rank, a sentence. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm_resume.errors import Interrupted, WorldSizeMismatch
from autoglm_resume.kinds import Kind
from autoglm_resume.worker.board import NEVER, Beat, Phase

_OWN = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals that a process brings upon itself."""


@dataclass(frozen=True)
class ErrorRecord:
    """The exception that ended a rank, as it recorded it itself."""

    type: str
    message: str
    traceback: str
    mono: float


@dataclass(frozen=True)
class Refusal:
    """A rank would not load the checkpoint it was given."""

    id: str
    step: int
    kind: str
    reason: str


@dataclass(frozen=True)
class RankEvidence:
    """What is known of one rank when the whole group is down."""

    rank: int
    code: int | None = None
    """Exit code, None if it died by a signal or is not known."""
    signal: int | None = None
    order: int = 0
    """Position in the order in which the ranks were seen to end."""
    ended: float = float("inf")
    """Monotonic seconds of its end."""
    by_us: bool = False
    """Whether it ended after we began to stop the group."""
    beat: Beat = NEVER
    error: ErrorRecord | None = None
    refusal: Refusal | None = None
    state: str = ""
    """Process state at the time of a hang, such as “stopped”."""

    @property
    def failed(self) -> bool:
        return not self.by_us and (
            self.signal is not None or self.code not in (0, Interrupted.exit_code, None)
        )


@dataclass(frozen=True)
class Failure:
    """The conclusion."""

    kind: Kind
    rank: int | None
    """The rank that failed first, not one of those that failed because of it."""
    summary: str
    step: int
    """Steps completed by the furthest rank, -1 if none ran."""
    cause_mono: float | None = None
    traceback: str = ""
    code: int | None = None
    signal: int | None = None
    refused: str | None = None
    """Id of the checkpoint that the rank would not load."""
    final: bool = False
    """Whether these ranks would refuse it again, and the gate has nothing to learn from that."""
    place: str = ""
    """Where it happened, alike for failures that are the same: “train.py:31 in step”."""
    evidence: tuple[str, ...] = ()
    """What the class was concluded from, a sentence each."""
    tail: str = ""
    """Last lines of the root rank's log."""


def conclude(ranks: Sequence[RankEvidence], hung: Sequence[int] = (), agent: str = "") -> Failure:
    """The failure of a group whose ranks left this evidence.

    `hung` ranks missed their beats; `agent` is what torchrun said about its own end.
    """
    step = max((r.beat.step for r in ranks), default=-1)
    refusals = [(r, r.refusal) for r in ranks if r.refusal is not None]
    if refusals:
        rank, refusal = min(refusals, key=lambda each: _is_final(each[1]))
        return Failure(
            Kind.REFUSED,
            rank.rank,
            f"rank {rank.rank} refused the checkpoint: {refusal.reason}",
            step,
            _cause(rank),
            refused=refusal.id,
            final=_is_final(refusal),
        )
    if hung:
        return _hang([r for r in ranks if r.rank in hung], step)
    failed = [r for r in ranks if r.failed]
    if not failed:
        summary = agent or "the worker group ended without a failed rank"
        return Failure(Kind.LAUNCH, None, summary, step)
    root = min(failed, key=_precedence)
    if root.signal is not None:
        kind = Kind.CRASHED if root.signal in _OWN else Kind.KILLED
        what = f"died by {signal_name(root.signal)}"
    elif root.error is not None:
        taken = "EADDRINUSE" in root.error.message or "already in use" in root.error.message
        kind = Kind.PORT if taken else Kind.EXCEPTION
        first = root.error.message.strip().splitlines()
        what = f"failed with {root.error.type}" + (f": {first[0][:300]}" if first else "")
    else:
        kind, what = Kind.EXITED, f"exited with code {root.code}"
    summary = f"rank {root.rank} {what} {where(root.beat)}"
    trace = root.error.traceback if root.error else ""
    return Failure(kind, root.rank, summary, step, _cause(root), trace, root.code, root.signal)


def _is_final(refusal: Refusal) -> bool:
    # Damage the gate remembers, and a model it compares by itself from then on. But whether a whole
    # checkpoint can be dealt to so many ranks only they can say, and they said it. An older one
    # would cost steps, another number of ranks may not: that is for a person to decide.
    return refusal.kind == WorldSizeMismatch.__name__


def where(beat: Beat) -> str:
    """“at step 41, in backward”."""
    if beat.phase is Phase.NONE or beat.step < 0:
        return beat.phase.label if beat.phase is not Phase.NONE else "before its first step"
    return f"at step {beat.step}, {beat.phase.label}"


def signal_name(number: int) -> str:
    """“SIGKILL”."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _precedence(rank: RankEvidence) -> tuple[int, float]:
    # A rank that a signal killed can only have been first: its peers' collectives break after it.
    # Not so SIGABRT: NCCL's watchdog and gloo abort a victim. Among the others the earliest record
    # is the root; without one, the order of the exits.
    if rank.signal is not None and rank.signal != signal.SIGABRT:
        return (0, rank.order)
    if rank.signal is not None:
        return (1, rank.ended)
    if rank.error is not None:
        return (1, rank.error.mono)
    return (1, float("inf")) if rank.code == 1 else (0, rank.order)


def _cause(rank: RankEvidence) -> float | None:
    return rank.error.mono if rank.error else None


def _hang(ranks: Sequence[RankEvidence], step: int) -> Failure:
    # Peers of a stuck rank wait in a collective, so prefer one whose process says why it is stuck.
    root = min(ranks, key=lambda r: (r.state != "stopped", r.beat.step, r.beat.time))
    state = f" (the process is {root.state})" if root.state == "stopped" else ""
    summary = f"rank {root.rank} stopped making progress {where(root.beat)}{state}"
    return Failure(Kind.HANG, root.rank, summary, step, root.beat.time / 1e9)
