"""What earlier lives of a run left in its journal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import Branch, attempt_of, is_id
from autoglm_resume.checkpoint.format.structure import Structure, combined
from autoglm_resume.errors import CheckpointError
from autoglm_resume.events import Event
from autoglm_resume.failures import Kind, known
from autoglm_resume.protocol.assignment import Beginning
from autoglm_resume.protocol.silences import Counts, merged
from autoglm_resume.supervise.core.failure import Previous
from autoglm_resume.supervise.core.policy import Ended

Silences: TypeAlias = Mapping[int, Mapping[int, Counts]]
"""Histograms by rank and phase; see protocol/silences.py."""


@dataclass(frozen=True)
class Model:
    """A model as a rank reported it, or the whole one."""

    hash: str
    structure: Structure | None


@dataclass(frozen=True)
class Exclusion:
    """A rank's GPU that the run goes on without."""

    host: str
    rank: int
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it, None where ranks have none."""


@dataclass(frozen=True)
class Pending:
    """What a supervisor had decided on and did not live to carry out, or to wait for."""

    action: str
    delay: float
    reason: str
    since: float
    """Unix seconds."""
    until: str = ""
    """What a pause waits for."""
    before: int | None = None
    """Of a roll-back; see `policy.RollBack`."""
    rank: int = -1
    """Whose GPU, on `host`, the run goes on without."""
    host: str = ""
    done: bool = True
    """Whether only the wait is left."""


@dataclass(frozen=True)
class History:
    """A run so far."""

    run_id: str | None = None
    attempts: int = 0
    finished: bool = False
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What the job's `checkpoint.skip` names, and how many attempts there were before it did."""
    begins: Beginning | None = None
    """What it had at step 0, where that was not what its script makes."""
    ended: tuple[Ended, ...] = ()
    """Failed attempts since the run was last given up, oldest first."""
    checkpointed: int = 0
    """Step of the newest checkpoint that was ever committed, 0 without one."""
    models: Mapping[int, Model] = field(default_factory=dict)
    """What the run is: as each rank had reported it when a checkpoint was committed last."""
    declared: Mapping[int, tuple[int, Model]] = field(default_factory=dict)
    """As each rank reported it last, and in which attempt: that may have been refused for it."""
    imports: tuple[str, ...] = ()
    """What a zygote may import ahead, in this order."""
    imports_end: bool = False
    """Whether what followed them could not be imported ahead: the rest is left to the ranks."""
    announced: frozenset[str] = frozenset()
    """Ids of the checkpoints that the journal has, as far as they were not removed since."""
    objects: dict[str, str] | None = None
    """Digests of the newest checkpoint's objects."""
    branches: tuple[Branch, ...] = ()
    """(step, attempt) where it went back to an older checkpoint on purpose: what earlier attempts
    saved after that step is of a branch that was given up."""
    failures: int = 0
    """Failed attempts ever."""
    trained: float = 0.0
    """Seconds that all attempts took."""
    replicated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ids of the checkpoints that each replica has."""
    silences: Silences = field(default_factory=dict)
    """How long ranks were silent between beats, by rank and phase."""
    previous: Previous | None = None
    """The last failure, if the run was not given up after it."""
    excluded: tuple[Exclusion, ...] = ()
    """Since the run was last given up."""
    pending: Pending | None = None
    started_from: int = 0
    """Step that the newest attempt began with."""
    began: float = 0.0
    """When, in Unix seconds."""


def before(unfit: str, modules: Sequence[str]) -> tuple[str, ...]:
    """The modules before the one that is unfit: what comes after it may need it, and would be found
    out one by one.
    """
    at = modules.index(unfit) if unfit in modules else len(modules)
    return tuple(modules[:at])


def recall(journal: Iterable[Event]) -> History:
    """Read a journal, oldest event first; what is missing or unknown is passed over."""
    past = before = History()
    for event in journal:
        if isinstance(event, events.SupervisorStarted):
            before = past
        if isinstance(event, events.JobKept):
            past = _unspoilt(past, before, finished=event.finished)
        else:
            past = _after(event, past)
    return past


def _unspoilt(past: History, before: History, *, finished: bool) -> History:
    """`past`, with its failures as they were `before` a supervisor was given another job."""
    return replace(
        past,
        finished=past.finished or finished,
        ended=before.ended,
        previous=before.previous,
        excluded=before.excluded,
        pending=before.pending,
    )


def _after(event: Event, past: History) -> History:
    match event:
        case events.BegunFrom(path=path, step=step, digest=digest, only=only):
            return replace(past, begins=Beginning(path, step, digest, only))
        case events.RunStarted(run_id=run_id):
            return replace(past, run_id=run_id)
        case events.AttemptStarted():
            return _attempt_started(event, past)
        case events.AttemptEnded(time=ended):
            return replace(past, trained=past.trained + max(0.0, (ended or 0.0) - past.began))
        case events.SilencesMeasured(silences=silences):
            return replace(past, silences=added(past.silences, silences))
        case events.ModelReported():
            return _model_reported(event, past)
        case events.ModulesImported(modules=modules) if not past.imports_end:
            return replace(past, imports=tuple(dict.fromkeys((*past.imports, *modules))))
        case events.ZygoteLost(module=str(unfit)) | events.StartedOver(module=unfit) if unfit:
            return replace(past, imports=before(unfit, past.imports), imports_end=True)
        case events.Committed():
            return _committed(event, past)
        case events.Pruned(id=id) | events.Quarantined(id=id):
            return replace(past, announced=past.announced - {id})
        case events.Replicated(replica=target, id=id):
            copies = (*past.replicated.get(target, ()), id)
            return replace(past, replicated={**past.replicated, target: copies})
        case events.GroupFailed():
            return _failed(event, past)
        case events.DecisionMade():
            return _decided(event, past)
        case events.Branched():
            return _branched(event, past)
        case events.Excluded(host=host, rank=rank, gpu=gpu):
            excluded = (*past.excluded, Exclusion(host, rank, gpu))
            return replace(past, excluded=excluded, pending=_done(past.pending))
        case events.RunInterrupted():
            return replace(past, pending=None)  # whoever starts it again wants it to go on at once
        case events.RunFailed():
            return replace(past, previous=None, ended=(), excluded=(), pending=None)
        case events.RunCompleted():
            return replace(past, finished=True)
        case events.JobChanged(finished=goes_on, skip=names):
            skipped = {**past.skipped, **dict.fromkeys(names, past.attempts)}
            return replace(past, finished=past.finished and not goes_on, skipped=skipped)
    return past


def _attempt_started(event: events.AttemptStarted, past: History) -> History:
    return replace(
        past,
        attempts=max(past.attempts, (event.attempt or 0) + 1),
        started_from=event.step,
        began=event.time or 0.0,
        pending=None,
    )


def _model_reported(event: events.ModelReported, past: History) -> History:
    try:
        structure = Structure.from_json(event.model) if event.model else None
    except (KeyError, TypeError, ValueError, CheckpointError):
        return past  # of another version, or damaged: it must not lose the rest
    declared = (event.attempt or 0, Model(event.hash, structure))
    return replace(past, declared={**past.declared, event.rank or 0: declared})


def _committed(event: events.Committed, past: History) -> History:
    # A model that trained as far as this is the run's; one that was only declared may be refused.
    saved = attempt_of(event.id) if is_id(event.id) else event.attempt
    proven = {
        rank: model
        for rank, (attempt, model) in past.declared.items()
        if saved is None or attempt <= saved
    }
    announced = past.announced | {event.id}
    past = replace(past, models={**past.models, **proven}, announced=announced)
    if event.step < past.checkpointed:
        return past
    return replace(past, checkpointed=event.step, objects=dict(event.objects))


def _failed(event: events.GroupFailed, past: History) -> History:
    ended = Ended(
        past.started_from,
        event.step,
        past.checkpointed,
        event.lived,
        event.refused,
        known(event.kind) or Kind.UNKNOWN,
        event.place,
        event.time or 0.0,
    )
    return replace(
        past,
        failures=past.failures + 1,
        ended=(*past.ended, ended),
        previous=Previous(ended.place, ended.furthest),
    )


def _decided(event: events.DecisionMade, past: History) -> History:
    pending = Pending(
        event.action,
        event.delay,
        event.reason,
        event.time or 0.0,
        event.until,
        None if event.before == -1 else event.before,
        -1 if event.rank is None else event.rank,
        event.host,
        done=event.before == -1 and event.rank is None,
    )
    answered = tuple(replace(last, action=event.action) for last in past.ended[-1:])
    return replace(past, pending=pending, ended=(*past.ended[:-1], *answered))


def _branched(event: events.Branched, past: History) -> History:
    past = replace(
        past,
        branches=(*past.branches, Branch(event.step, event.attempt or 0)),
        checkpointed=event.step,
        finished=False,
        pending=_done(past.pending),
    )
    if event.reason:
        return past
    return replace(past, ended=(), previous=None)  # a person asked for it: what failed is past


def _done(pending: Pending | None) -> Pending | None:
    return pending and replace(pending, done=True)


def skipped(past: History, asked: Iterable[str], checkpoint: str | None) -> tuple[str, ...]:
    """Which of the names in `checkpoint.skip` a checkpoint does not give back.

    One that was made since has them as the script made them then.
    """
    if checkpoint is None:
        return ()
    made = attempt_of(checkpoint)
    return tuple(name for name in asked if made < past.skipped.get(name, 0))


def added(silences: Silences, more: Mapping[int, Mapping[int, Mapping[int, int]]]) -> Silences:
    """`silences` and those of another attempt."""
    found = dict(silences)
    for rank, phases in more.items():
        new = {phase: dict(counts) for phase, counts in phases.items()}
        found[rank] = merged([found.get(rank, {}), new])
    return found


def heard(known: Mapping[int, Model], now: Mapping[int, Model]) -> dict[int, Model]:
    """`known`, once the ranks of an attempt report what is in `now`; by rank.

    If they have become others, what was known says nothing of the ranks that are still silent.
    """
    if any(rank in known and known[rank].hash != model.hash for rank, model in now.items()):
        return dict(now)
    return {**known, **now}


def model_of(reported: Mapping[int, Model], world_size: int) -> Model | None:
    """The whole model from what each rank reported last; rank 0's structure stands for all.

    Ranks that died before they could say so most likely have the model that all others have;
    where ranks differ (pipeline stages) the whole is not known without them.
    """
    ranks = [rank for rank in sorted(reported) if rank < world_size]
    hashes = [reported[rank].hash for rank in ranks]
    if not ranks or (len(ranks) < world_size and len(set(hashes)) > 1):
        return None
    return Model(combined(hashes), reported[ranks[0]].structure)
