"""How far the copies of a run's checkpoints are, from its journal alone. Pure.

What a replica has is what was copied there; that somebody deleted it there is noticed when the
replicator looks again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import is_id, newer, recency
from autoglm_resume.checkpoint.store.gate import superseded
from autoglm_resume.events import Event
from autoglm_resume.observe.pure.say import short
from autoglm_resume.supervise.core import history


@dataclass(frozen=True)
class Replica:
    """One place where copies go."""

    target: str
    newest: str | None
    """Id of the newest checkpoint of the run's present branch that was copied there."""
    behind: int
    """Checkpoints here that are newer."""
    error: str
    """Why nothing can be copied, or not fast enough; empty once it has caught up."""
    since: float | None
    """Unix seconds from when that is so."""


def of(journal: Sequence[Event], targets: Iterable[str]) -> tuple[Replica, ...]:
    """The replicas at `targets`; the events of `journal` come oldest first."""
    past = history.recall(journal)
    here: dict[str, None] = {}
    behind: dict[str, events.ReplicaBehind] = {}
    for event in journal:
        match event:
            case events.Committed(id=id) | events.BroughtBack(id=id) if is_id(id):
                here[id] = None
            case events.Pruned(id=id) | events.Quarantined(id=id):
                here.pop(id, None)
            case events.ReplicaBehind(replica=replica):
                behind[replica] = event
            case events.ReplicaCaughtUp(replica=replica):
                behind.pop(replica, None)
    present = [id for id in here if superseded(id, past.branches) is None]
    found = []
    for target in targets:
        copied = [
            id for id in past.replicated.get(target, ()) if superseded(id, past.branches) is None
        ]
        newest = max(copied, key=recency, default=None)
        waiting = [id for id in present if newest is None or newer(id, newest)]
        last = behind.get(target)
        reason, since = (short(last.reason), last.time) if last else ("", None)
        found.append(Replica(target, newest, len(waiting), reason, since))
    return tuple(found)
