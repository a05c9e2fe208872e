"""What earlier lives of a run left in its journal. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoglm_resume.checkpoint.structure import Structure, combined
from autoglm_resume.supervise.policy import Ended

Event = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The model as the ranks last reported it."""

    hash: str
    structure: Structure | None


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
    model: Model | None = None
    imports: tuple[str, ...] = ()
    objects: dict[str, str] | None = None
    """Digests of the newest checkpoint's objects."""


def recall(events: Iterable[Event]) -> History:
    """Read a journal, oldest event first; what is missing or unknown is passed over."""
    run_id: str | None = None
    attempts = checkpointed = started_from = 0
    finished = False
    ended: list[Ended] = []
    reported: dict[int, tuple[str, Any]] = {}
    imports: list[str] = []
    objects: dict[str, str] | None = None
    for event in events:
        match event["event"]:
            case "run_started":
                run_id = event.get("run_id")
            case "attempt_started":
                attempts = max(attempts, int(event["attempt"]) + 1)
                started_from = int(event.get("step") or 0)
            case "model":
                reported[int(event["rank"])] = (event["hash"], event.get("model"))
            case "imports":
                imports += [name for name in event["modules"] if name not in imports]
            case "committed":
                if int(event["step"]) >= checkpointed:
                    checkpointed, objects = int(event["step"]), event.get("objects")
            case "failure":
                ended.append(Ended(started_from, int(event.get("step", -1)), checkpointed))
            case "run_failed":
                ended.clear()
            case "run_completed":
                finished = True
    return History(
        run_id,
        attempts,
        finished,
        tuple(ended),
        checkpointed,
        model_of(reported),
        tuple(imports),
        objects,
    )


def model_of(reported: dict[int, tuple[str, Any]]) -> Model | None:
    """The whole model from what each rank reported: (hash, structure as JSON) by rank."""
    if not reported:
        return None
    ranks = sorted(reported)
    document = reported[ranks[0]][1]
    structure = Structure.from_json(document) if document else None
    return Model(combined([reported[rank][0] for rank in ranks]), structure)
