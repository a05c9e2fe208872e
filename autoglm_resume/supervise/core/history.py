"""What earlier lives of a run left in its journal. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.structure import Structure, combined
from autoglm_resume.errors import CheckpointError
from autoglm_resume.failures import Kind
from autoglm_resume.journal import Event
from autoglm_resume.protocol.silences import Counts, merged
from autoglm_resume.supervise.core.diagnosis import Previous
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
    ended: tuple[Ended, ...] = ()
    """Failed attempts since the run was last given up, oldest first."""
    checkpointed: int = 0
    """Step of the newest checkpoint that was ever committed, 0 without one."""
    models: Mapping[int, Model] = field(default_factory=dict)
    """As each rank reported it last."""
    imports: tuple[str, ...] = ()
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


def recall(events: Iterable[Event]) -> History:
    """Read a journal, oldest event first; what is missing or unknown is passed over."""
    run_id: str | None = None
    attempts = checkpointed = started_from = 0
    finished = False
    ended: list[Ended] = []
    reported: dict[int, Model] = {}
    imports: list[str] = []
    objects: dict[str, str] | None = None
    branches: list[Branch] = []
    failures, trained, began = 0, 0.0, 0.0
    replicated: dict[str, tuple[str, ...]] = {}
    silences: Silences = {}
    previous: Previous | None = None
    excluded: list[Exclusion] = []
    pending: Pending | None = None
    for event in events:
        # A line of another version, or one that was damaged, must not lose the rest.
        with contextlib.suppress(KeyError, TypeError, ValueError, CheckpointError):
            match event["event"]:
                case "run_started":
                    run_id = event["run_id"]
                case "attempt_started":
                    attempts = max(attempts, int(event["attempt"]) + 1)
                    started_from, began = int(event["step"]), float(event["time"])
                    pending = None
                case "attempt_ended":
                    trained += max(0.0, float(event["time"]) - began)
                case "gaps":
                    silences = added(silences, event["silences"])
                case "model":
                    structure = event["model"] and Structure.from_json(event["model"])
                    reported[int(event["rank"])] = Model(event["hash"], structure or None)
                case "imports":
                    imports += [name for name in event["modules"] if name not in imports]
                case "branched":
                    branches.append(Branch(int(event["step"]), int(event["attempt"])))
                    checkpointed, finished = int(event["step"]), False
                    pending = pending and replace(pending, done=True)
                    if event.get("reason") is None:  # a person asked for it: what failed is past
                        ended.clear()
                        previous = None
                case "committed":
                    if int(event["step"]) >= checkpointed:
                        checkpointed, objects = int(event["step"]), event["objects"]
                case "failure":
                    failures += 1
                    ended.append(_ended(event, started_from, checkpointed))
                    previous = Previous(ended[-1].place, ended[-1].furthest)
                case "decision":
                    pending = _pending(event)
                    ended[-1:] = [replace(last, action=event["action"]) for last in ended[-1:]]
                case "excluded":
                    gpu, host = event.get("gpu"), str(event["host"])
                    excluded.append(Exclusion(host, int(event["rank"]), gpu))
                    pending = pending and replace(pending, done=True)
                case "run_interrupted":
                    pending = None  # whoever starts it again wants it to go on at once
                case "replicated":
                    target = str(event["replica"])
                    replicated[target] = (*replicated.get(target, ()), str(event["id"]))
                case "run_failed":
                    previous = None
                    ended.clear()
                    excluded.clear()
                    pending = None
                case "run_completed":
                    finished = True
    return History(
        run_id,
        attempts,
        finished,
        tuple(ended),
        checkpointed,
        reported,
        tuple(imports),
        objects,
        tuple(branches),
        failures,
        trained,
        replicated,
        silences,
        previous,
        tuple(excluded),
        pending,
    )


def _ended(event: Event, started_from: int, checkpointed: int) -> Ended:
    known = {kind.value for kind in Kind}
    return Ended(
        started_from,
        int(event["step"]),
        checkpointed,
        event.get("lived"),
        event.get("refused"),
        Kind(event["kind"]) if event.get("kind") in known else Kind.UNKNOWN,
        str(event.get("place") or ""),
        float(event["time"]),
    )


def _pending(event: Event) -> Pending:
    return Pending(
        str(event["action"]),
        float(event["delay"]),
        str(event["reason"]),
        float(event["time"]),
        str(event.get("until") or ""),
        event.get("before"),
        int(event.get("rank", -1)),
        str(event.get("host") or ""),
        done=not {"before", "rank"} & event.keys(),
    )


def added(silences: Silences, more: Mapping[Any, Mapping[Any, Mapping[Any, int]]]) -> Silences:
    """`silences` and those of another attempt, whose keys may be text as JSON has them."""
    found = dict(silences)
    for rank, phases in more.items():
        new = {int(p): {int(at): int(n) for at, n in c.items()} for p, c in phases.items()}
        found[int(rank)] = merged([found.get(int(rank), {}), new])
    return found


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
