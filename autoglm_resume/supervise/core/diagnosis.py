"""What happened to a worker group: from evidence to a class, a root rank, a sentence. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoglm_resume.errors import ObjectMismatch, WorldSizeMismatch
from autoglm_resume.failures import TRAITS, Kind
from autoglm_resume.supervise.core import code_location, patterns
from autoglm_resume.supervise.core.evidence import (
    ErrorRecord,
    Machine,
    RankEvidence,
    Refusal,
    signal_name,
    tail,
    where,
)
from autoglm_resume.supervise.core.failure import Failure, Previous
from autoglm_resume.supervise.core.rank_cause import Cause, cause_of

FEW = 8
"""Other ranks that the evidence tells of, one by one."""


def conclude(
    ranks: Sequence[RankEvidence],
    hung: Sequence[int] = (),
    agent: str = "",
    machine: Machine | None = None,
    previous: Failure | Previous | None = None,
    slow: Mapping[int, float] | None = None,
) -> Failure:
    """The failure of a group whose ranks left this evidence.

    `hung` ranks missed their beats; `agent` is what torchrun said about its own end; `previous` is
    the failure before this one, if no one has intervened since. `slow` ranks, and how many times
    slower than their peers they are, ended it if the job says that they do.
    """
    machine = machine or Machine()
    step = max((r.beat.step for r in ranks), default=-1)
    refusals = [(r, r.refusal) for r in ranks if r.refusal is not None]
    if refusals:
        refuser, refusal = min(refusals, key=lambda each: _is_final(each[1]))
        return Failure(
            Kind.REFUSED,
            refuser.rank,
            f"rank {refuser.rank} refused the checkpoint: {refusal.reason}",
            step,
            _cause_mono(refuser),
            refused=refusal.id,
            final=_is_final(refusal),
            hint=refusal.hint,
        )
    if slow:
        rank, ratio = max(slow.items(), key=lambda each: each[1])
        summary = f"rank {rank} is slow: its own work takes {ratio:.1f} times that of its peers"
        return Failure(Kind.STRAGGLER, rank, summary, step, place=f"straggler rank {rank}")
    suspects = [r for r in ranks if r.rank in hung]
    if suspects:
        return _by_hardware(_hang(suspects, ranks, step), suspects, machine)
    failed = [r for r in ranks if r.failed]
    if not failed:
        if agent:
            return Failure(Kind.LAUNCH, None, agent, step)
        return Failure(Kind.UNKNOWN, None, "the worker group ended without a failed rank", step)
    causes = {r.rank: cause_of(r, machine) for r in failed}
    root = min(failed, key=lambda r: (causes[r.rank].tier, *_when(r)))
    failure = _by_hardware(_told(root, causes, ranks, machine, step), [root], machine)
    return _repeated(failure, previous)


def _when(rank: RankEvidence) -> tuple[float, int]:
    """When it failed, by its own record, else by its end."""
    return (rank.error.mono if rank.error and rank.signal is None else rank.ended, rank.order)


def _is_final(refusal: Refusal) -> bool:
    # Damage the gate remembers, and a model it compares by itself from then on. But whether a whole
    # checkpoint can be dealt to so many ranks, and fits what the script tracks, only they can say,
    # and they said it. An older one would cost steps, another number of ranks or a script that is
    # mended may not: that is for a person to decide.
    return refusal.kind in (WorldSizeMismatch.__name__, ObjectMismatch.__name__)


def _by_hardware(failure: Failure, roots: Sequence[RankEvidence], machine: Machine) -> Failure:
    """The same, if a GPU broke at the time: that then is the cause."""
    if not TRAITS[failure.kind].like_gpu:
        return failure
    pids, said = {rank.pid for rank in roots}, []
    for line in machine.kernel or ():
        found = patterns.xid(line)
        if found is not None and (found.pid in pids or _is_ours(found.bus, machine)):
            said.append(f"the kernel's log: {line}")
    for gpu in machine.gpus or ():
        if gpu.lost:
            said.append(f"the driver has lost GPU {gpu.index} ({gpu.bus})")
        elif gpu.uncorrected:
            said.append(f"GPU {gpu.index} ({gpu.bus}): {gpu.uncorrected} uncorrected ECC errors")
    if not said:
        return failure
    return replace(failure, kind=Kind.GPU_FAULT, evidence=(*said, *failure.evidence))


def _is_ours(bus: str, machine: Machine) -> bool:
    # In a container NVML lists the job's GPUs only, but the kernel's log tells of all.
    listed = [gpu.bus.lower() for gpu in machine.gpus or ()]
    return not listed or any(bus.lower().removeprefix("0000:") in each for each in listed)


# The whole


def _told(
    root: RankEvidence,
    causes: dict[int, Cause],
    ranks: Sequence[RankEvidence],
    machine: Machine,
    step: int,
) -> Failure:
    cause = causes[root.rank]
    error = root.error if root.signal is None else None
    trace = error.traceback if error else ""
    misused = error is not None and cause.kind is Kind.USAGE_ERROR
    others = []
    for rank in ranks:
        if rank.rank == root.rank:
            continue
        if rank.rank in causes:
            after = causes[rank.rank]
            follows = ", which follows" if after.tier > cause.tier else ""
            others.append(f"rank {rank.rank} {after.what} {where(rank.beat)}{follows}")
        elif cause.tier == 2 and rank.by_us:
            others.append(f"rank {rank.rank} had not failed: it was {where(rank.beat)}")
    evidence = [f"the message means: {cause.means}"] if cause.means else []
    evidence += (*cause.evidence, *_few(others))
    evidence += [f"{space.path} did not answer" for space in machine.spaces if space.free is None]
    return Failure(
        cause.kind,
        root.rank,
        f"rank {root.rank} {cause.what} {where(root.beat)}{_line(trace, misused=misused)}",
        step,
        _cause_mono(root),
        root.error.traceback if root.error and not misused else "",
        root.code,
        root.signal,
        hint=error.hint if error and misused else "",
        place=_place(root, error, trace),
        evidence=tuple(evidence),
        tail=tail(root.log),
    )


def _few(said: Sequence[str]) -> tuple[str, ...]:
    """What is said of other ranks, of which there may be hundreds."""
    left = len(said) - FEW
    return tuple(said) if left <= 1 else (*said[:FEW], f"and alike of {left} ranks more")


def _line(trace: str, *, misused: bool) -> str:
    line = "" if misused else code_location.of_traceback(trace)
    return f", at {line}" if line else ""


def _place(root: RankEvidence, error: ErrorRecord | None, trace: str) -> str:
    if error is not None:
        line = code_location.of_traceback(trace)
        return f"{error.type} at {line}" if line else f"{error.type} {where(root.beat)}"
    how = signal_name(root.signal) if root.signal is not None else f"exit code {root.code}"
    return f"{how} {where(root.beat)}"


def _repeated(failure: Failure, previous: Failure | Previous | None) -> Failure:
    """The same, as the code's error, if it did just this before and came no further since."""
    if previous is None or not failure.place or not TRAITS[failure.kind].of_code:
        return failure
    if failure.place != previous.place or failure.step > previous.step:
        return failure
    again = f"the attempt before ended in the same way ({failure.place}), and no step came between"
    return replace(failure, kind=Kind.CODE_ERROR, evidence=(again, *failure.evidence))


def _cause_mono(rank: RankEvidence) -> float | None:
    return rank.error.mono if rank.error else None


_STATES = {"stopped": "stopped", "disk-sleep": "stuck in the kernel"}
"""Process states that explain a hang."""


def _hang(suspects: Sequence[RankEvidence], ranks: Sequence[RankEvidence], step: int) -> Failure:
    # Peers of a stuck rank wait in a collective, so prefer one whose process or stack says that it
    # does not; then one that does what no other does; then the one that went quiet first.
    lines = {rank.rank: code_location.of_stack(rank.stack) for rank in ranks}
    alike = [lines[rank.rank] for rank in suspects]

    def suspicion(rank: RankEvidence) -> tuple[bool, int, bool, int, int]:
        at = lines[rank.rank]
        return (
            rank.state not in _STATES,
            rank.beat.step,
            code_location.waits(rank.stack),
            alike.count(at) if at else len(alike),
            rank.beat.time,
        )

    root = min(suspects, key=suspicion)
    at, state = lines[root.rank], _STATES.get(root.state)
    line = (f", at {at}" if at else "") + (f" (the process is {state})" if state else "")
    return Failure(
        Kind.HANG,
        root.rank,
        f"rank {root.rank} stopped making progress {where(root.beat)}{line}",
        step,
        root.beat.time / 1e9,
        place=f"hang at {at}" if at else f"hang {where(root.beat)}",
        evidence=_few(
            [
                f"rank {rank.rank} was {where(rank.beat)}"
                + (f", at {lines[rank.rank]}" if lines[rank.rank] else "")
                + (", waiting for others" if code_location.waits(rank.stack) else "")
                for rank in ranks
                if rank.rank != root.rank
            ]
        ),
        tail=tail(root.log),
    )
