"""Events that supervisors write. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_resume.events.base import Event, OfRank
from autoglm_resume.records import Record, unsaid

# The run, and the lives of its supervisors


class RunStarted(Event):
    run_id: str
    name: str = ""
    host: str = ""
    pid: int | None = None
    version: str = ""
    world_size: int | None = None
    launcher: str = "warm"
    job: Mapping[str, Any] = {}
    """As it may be shown: without secrets."""
    drills: tuple[str, ...] = ()
    """As `--drill` had them."""


class SupervisorStarted(Event):
    pid: int | None = None
    host: str = ""
    boot_id: str = ""
    """Of the machine: monotonic times of different boots cannot be compared."""
    resumed: bool = False


class Slurm(Event):
    """The supervisor is part of a job of Slurm."""

    job: str | None = None
    restarts: int = 0
    node: str = ""


class TimeLimitKnown(Event, name="time_limit"):
    """The time of a scheduler's job."""

    seconds: float | None = None
    """Left."""
    lead: float | None = None
    """Seconds before the end at which the run is stopped."""


class SaveInterval(Event, name="interval"):
    """How often the ranks save by the clock, from now on."""

    seconds: float | None = None
    reason: str = ""


class SaveRequested(Event):
    step: int | None
    """After which the ranks will save; None if they cannot."""
    reason: str = unsaid("")


class SaveCutOff(Event):
    """Ranks died while it was under way; nothing failed."""

    id: str = ""
    step: int | None = None
    missing: tuple[int, ...] = ()
    """Ranks that had no whole snapshot of it."""


class StopRequested(Event):
    by: str = "?"
    """The signal's name, or words."""


class RunCompleted(Event):
    step: int | None = None
    """-1 where no rank had a session."""
    objects: Mapping[str, str] = {}
    """Digests of what the last checkpoint holds, by name."""
    seconds: float | None = None
    """This life took."""


class RunInterrupted(Event):
    code: int | None = None
    """Exit code."""
    reason: str = ""
    step: int | None = unsaid(None)
    """Of the newest checkpoint, 0 without one."""


class RunFailed(Event):
    code: int | None = None
    """Exit code."""
    reason: str = ""
    hint: str = unsaid("")
    """What a person may do."""


class WarningGiven(OfRank, name="warning"):
    text: str = ""


class NotifyFailed(Event):
    """Nobody can be told through `target`, until that works again."""

    target: str = "?"
    """Its address is masked."""
    reason: str = "?"


class DrillFired(Event, name="drill"):
    """A fault that a person ordered."""

    spec: str = "?"
    kind: str = ""
    rank: int | None = None
    step: int | None = None
    target: str | None = None
    """The checkpoint that is damaged."""


# The launcher


class ZygoteReady(Event):
    pid: int | None = None
    seconds: float | None = None
    """It took to import everything."""
    modules: int = 0
    skipped: tuple[str, ...] = ()
    """Modules that could not be imported ahead, and why."""


class ZygoteLost(Event):
    reason: str = "?"
    module: str = ""
    """After whose import it could not fork, if that was it."""


class ColdStart(Event):
    reason: str = "?"


class SpareReady(Event):
    pid: int | None = None


class SpareDropped(Event):
    pid: int | None = None
    reason: str = "?"


class SpareFailed(Event):
    pid: int | None = None
    reason: str = "?"


# Checkpoints and their gate


class CheckMade(Record):
    """One check of the gate on a checkpoint."""

    name: str = ""
    ok: bool = False
    expected: str = ""
    found: str = ""
    detail: str = ""


class Judged(Record):
    """What the gate found of a checkpoint; written by `checkpoint.store.gate.Verdict`."""

    id: str = ""
    step: int | None = None
    path: str = ""
    accepted: bool = False
    checks: tuple[CheckMade, ...] = ()
    corrupt: bool = False
    reason: str = ""


class GatePassed(Event, name="gate"):
    """All checkpoints that were looked at before an attempt, newest first."""

    verdicts: tuple[Judged, ...] = ()
    accepted: str | None = None
    """Id of the one to start from."""
    step: int = 0
    seconds: float = 0.0
    """It took."""


class Quarantined(Event):
    id: str
    step: int | None = None
    reason: str = ""


class Branched(Event):
    """The run goes on from `step` in `attempt`; what earlier ones saved since is left behind."""

    step: int
    reason: str = unsaid("")
    """Empty if a person asked for it."""


class BroughtBack(Event):
    """The newest checkpoint of a replica, where none was left here."""

    id: str
    files: int = 0


class Replicated(Event):
    id: str
    replica: str
    seconds: float | None = None
    bytes: int = 0


class ReplicaBehind(Event):
    replica: str
    behind: int | None = None
    """Checkpoints that wait to be copied, None if not known."""
    reason: str = "?"


class ReplicaCaughtUp(Event):
    replica: str
    seconds: float | None = None
    """It was behind."""


class ReplicasFlushed(Event):
    """The wait for replicas at the end of the run is over."""

    seconds: float | None = None
    behind: Mapping[str, int | None] = {}
    """Checkpoints that each of those which are short still lacks, None where that is not known."""


class Repaired(Event):
    """Files of a checkpoint were replaced by a replica's."""

    id: str
    files: tuple[str, ...] = ()
    seconds: float | None = None


class RepairFailed(Event):
    id: str
    reason: str = "?"
    seconds: float | None = None


# An attempt, as its supervisor sees it


class AttemptStarted(Event):
    port: int | None = None
    resume: str | None = None
    """Id of the checkpoint that it begins with."""
    step: int
    """Its step, 0 without one."""
    pids: Mapping[int, int] = {}
    """By rank; torchrun's own is that of rank -1."""


class Straggler(OfRank):
    ratio: float | None = None
    """How many times slower than its peers."""


class RankExit(Record):
    """How one rank of a failed attempt ended."""

    rank: int
    code: int | None = None
    signal: int | None = None
    by_us: bool = False
    """Whether it ended after the group began to be stopped."""
    step: int | None = None
    phase: str = ""
    node: str = unsaid("")


class GroupFailed(Event, name="failure"):
    """What was concluded of the end of an attempt; see `supervise.core.failure.Failure`."""

    kind: str = ""
    """A `failures.Kind`, or that of a newer version."""
    root_rank: int | None = None
    """The rank that failed first."""
    summary: str = ""
    ranks: tuple[RankExit, ...] = ()
    traceback: str = ""
    cause_mono: float | None = None
    """When it happened, as far as that is known; `mono` is when it was noticed."""
    refused: str | None = None
    """Id of the checkpoint that a rank would not load."""
    stacks: Mapping[int, tuple[str, ...]] = {}
    """Python frames of the ranks when they hung, innermost first."""
    step: int = -1
    """Of the furthest rank, -1 if none ran."""
    place: str = ""
    evidence: tuple[str, ...] = ()
    tail: str = ""
    """Last lines of the root rank's log."""
    lived: float | None = None
    """Seconds it ran, where no rank had a session."""


class GroupStopped(Event):
    seconds: float | None = None
    """It took to stop the ranks after a failure."""


class SilencesMeasured(Event, name="gaps"):
    """How long the ranks of an attempt were silent between beats."""

    silences: Mapping[int, Mapping[int, Mapping[int, int]]] = {}
    """Counts by rank, phase and bucket; see `protocol.silences`."""


class AttemptEnded(Event):
    outcome: str | None = None
    """completed, failed or interrupted."""
    step: int | None = None
    """Of the furthest rank, -1 if none ran."""
    last_step_mono: float | None = None
    """When it was complete."""


# Between two attempts


class DecisionMade(Event, name="decision"):
    """The answer to a failure, with what the next supervisor needs if this one does not live to
    carry it out.
    """

    action: str = ""
    """restart, roll_back, smaller, pause, requeue or give_up."""
    delay: float = 0.0
    """Seconds."""
    reason: str = ""
    breaker: str = ""
    """closed, open or half-open."""
    until: str = unsaid("")
    """What a pause waits for: space or storage."""
    before: int | None = unsaid(-1)
    """Of a roll-back; see `supervise.core.policy.RollBack`. -1 of anything else."""
    rank: int | None = unsaid(None)
    """Whose GPU, on `host`, the run goes on without."""
    host: str = unsaid("")


class Excluded(Event):
    """The run goes on without the GPU of a rank."""

    host: str
    rank: int
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it, None where ranks have none."""


class WaitingOn(Event, name="waiting"):
    """The rest of a delay that an earlier supervisor did not live to see."""

    seconds: float | None = None
    reason: str = "?"


class Paused(Event):
    until: str = ""
    reason: str = "?"


class PauseEnded(Event):
    seconds: float | None = None
    problem: str = ""
    """What still holds it up; empty if it goes on."""
