"""Which checkpoints may go, and why the others stay. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from autoglm_resume.checkpoint.format.manifest import Manifest

PROTECTED: Final = "accepted last"
"""Why the protected ones stay."""
LEFT: Final = "of a branch that was left; `autoglm prune` may delete it"
"""Why what a branch left behind stays until a person wants it gone."""


@dataclass(frozen=True)
class KeepBest:
    """Keep the `n` checkpoints whose `metric` is smallest (`min`) or largest (`max`)."""

    metric: str = "loss"
    n: int = 1
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class KeepRules:
    """What to keep: whatever any of these rules wants.

    Of a branch that was given up they want what is young, and the best of all.
    """

    last: int = 3
    """The newest ones; the newest of all stays whatever is asked for."""
    every_steps: int | None = None
    """Those whose step is divisible by this, for ever."""
    best: KeepBest | None = None
    for_seconds: float | None = None
    """Those that are younger."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeepRules:
        """What `dataclasses.asdict` made of it."""
        return cls(**{**data, "best": KeepBest(**data["best"]) if data["best"] else None})


@dataclass(frozen=True)
class RetentionEntry:
    """A committed checkpoint, as far as it matters here."""

    id: str
    step: int
    created: float
    """Unix seconds."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    """Ids of the older checkpoints whose packs it refers to."""
    stored: int = 0
    """Bytes that deleting it would free."""
    given_up: bool = False
    """It is of a branch that the run left behind."""

    @classmethod
    def of(cls, manifest: Manifest, *, given_up: bool = False) -> RetentionEntry:
        """As its manifest has it."""
        return cls(
            id=manifest.id,
            step=manifest.step,
            created=manifest.created,
            metrics=manifest.metrics,
            needs=frozenset(manifest.needs),
            stored=manifest.stored,
            given_up=given_up,
        )


def doomed(
    candidates: Sequence[RetentionEntry],
    keep: KeepRules,
    protected: frozenset[str],
    now: float,
    *,
    pruning: bool = False,
) -> list[str]:
    """Ids to delete, in this order: what needs another goes before it.

    So a crash in between leaves no checkpoint without what it needs. `candidates` come newest
    first; hand in only what is good, so that broken checkpoints never push out a good one. The
    newest and the `protected` ids (what the gate accepted last) always stay, and with each that
    stays everything it needs. `now` is Unix seconds. Only with `pruning`, which a person has asked
    for, does anything go of a branch that was given up.
    """
    why = explain(candidates, keep, protected, now, pruning=pruning)
    return [each.id for each in candidates if not why[each.id]]


def explain(
    candidates: Sequence[RetentionEntry],
    keep: KeepRules,
    protected: frozenset[str],
    now: float,
    *,
    pruning: bool = False,
) -> dict[str, tuple[str, ...]]:
    """For each id why it is kept, in a few words each; nothing for what may go. See `doomed`."""
    why: dict[str, list[str]] = {each.id: [] for each in candidates}
    for id, reason in _wanted(candidates, keep, now):
        why[id].append(reason)
    for each in candidates:
        if each.given_up and not pruning and not why[each.id]:
            why[each.id].append(LEFT)
    for id in protected & why.keys():
        why[id].append(PROTECTED)
    kept = [each for each in candidates if why[each.id]]
    for each in kept:  # which grows: what is needed needs others in turn
        for other in candidates:
            if other.id in each.needs and not why[other.id]:
                why[other.id].append(f"needed by {each.id}")
                kept.append(other)
    return {id: tuple(reasons) for id, reasons in why.items()}


def _wanted(
    candidates: Sequence[RetentionEntry], keep: KeepRules, now: float
) -> Iterator[tuple[str, str]]:
    """(id, reason) for every rule that wants a checkpoint."""
    present = [each for each in candidates if not each.given_up]
    last = max(1, keep.last)
    for each in (present or candidates)[:last]:
        yield each.id, "the newest" if last == 1 else f"one of the last {last}"
    for each in present:
        if keep.every_steps and each.step % keep.every_steps == 0:
            yield each.id, f"step divisible by {keep.every_steps}"
    for each in candidates:
        if keep.for_seconds is not None and now - each.created < keep.for_seconds:
            yield each.id, f"younger than {_duration(keep.for_seconds)}"
    if keep.best:
        metric, sign = keep.best.metric, 1 if keep.best.mode == "min" else -1
        known = [c for c in candidates if math.isfinite(c.metrics.get(metric, math.nan))]
        # Sorting is stable: of equal ones the newest counts as best.
        ranking = sorted(known, key=lambda each: sign * each.metrics[metric])
        # The best of all is a result, whatever the run did since; the present branch has its own.
        ranks = (ranking, [each for each in ranking if not each.given_up])
        best = {e.id: (nth, e) for r in ranks for nth, e in enumerate(r[: keep.best.n], start=1)}
        for id, (nth, each) in best.items():
            yield id, f"{_ordinal(nth)}best {metric} {each.metrics[metric]:.4g}"


def _ordinal(nth: int) -> str:
    """Nothing for the first, “2nd ” for the second."""
    if nth == 1:
        return ""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(nth % 10, "th")
    return f"{nth}{'th' if 10 < nth % 100 < 14 else ending} "


def _duration(seconds: float) -> str:
    """“2 d”, “1.5 h”."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
