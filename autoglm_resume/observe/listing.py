"""All checkpoints of a directory at a glance, and why each is kept. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoglm_resume import files
from autoglm_resume.checkpoint.format import document
from autoglm_resume.checkpoint.format.ids import newer, recency, step_of
from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.replicas.plan import newest_counting
from autoglm_resume.checkpoint.store import retention
from autoglm_resume.checkpoint.store.commit import whole
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.gate import Candidate, Verdict
from autoglm_resume.checkpoint.store.retention import KeepRules, RetentionEntry
from autoglm_resume.checkpoint.store.store import REASON
from autoglm_resume.errors import CheckpointError
from autoglm_resume.events import CheckMade, GatePassed
from autoglm_resume.observe import inspection
from autoglm_resume.observe.inspection import Inspected
from autoglm_resume.observe.progress import Progress
from autoglm_resume.observe.pure.say import check as failed_check
from autoglm_resume.observe.pure.say import seconds, short, size
from autoglm_resume.observe.tables import Table
from autoglm_resume.supervise.base.run_directory import RunDirectory

LARGEST_NOTE = 1 << 20
"""Bytes of a file that says why a checkpoint is in quarantine."""


@dataclass(frozen=True)
class Listed:
    """One checkpoint among the others."""

    facts: Candidate
    verdict: Verdict
    parent_here: bool
    branch: bool
    """Whether the newest good one is known not to descend from it."""
    kept: tuple[str, ...] | None
    """Why it stays, empty if it may go; None if no rule speaks of it: it is not good, or no rules
    are known."""
    lacking: frozenset[str] = frozenset()
    """Ids of those that it needs and that are not there."""


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a directory, newest first."""

    root: Path
    keep: KeepRules | None
    checkpoints: tuple[Listed, ...]
    quarantined: tuple[tuple[str, str], ...]
    """(name, reason)."""
    now: float
    """Unix seconds for which all this is said."""

    @property
    def doomed(self) -> list[Listed]:
        """What may go, in the order in which it should."""
        return [each for each in self.checkpoints if each.kept == ()]


def keep_of(run: RunDirectory | None) -> KeepRules | None:
    """What the job of `run` keeps, None without a run. Raises UsageError if it is no job."""
    if run is None:
        return None
    from autoglm_resume.job.load import keep_of

    written = run.section("checkpoint").get("keep")
    return KeepRules() if written is None else keep_of(written, f"{run.path}/job.json")


def of(target: Inspected, keep: KeepRules | None, now: float, *, pruning: bool = False) -> Listing:
    """Look at all checkpoints beside each other; `now` is Unix seconds.

    With `pruning`, what a branch has left behind may go, too.

    Packs whose stat fingerprint is not the recorded one are read, as the gate would.
    """
    expected = inspection.expectation(target.run)
    found: list[tuple[Candidate, Verdict]] = []
    with Progress("reading", inspection.stored_bytes(target, target.paths)) as progress:
        for path in target.paths:
            facts = examine(target.store, path, progress=progress)
            if facts.integrity.ok or path.exists():  # else the run has retired it by now
                found.append((facts, inspection.judged(facts, expected)))
    kept = _kept(target, found, keep, now, pruning=pruning) if keep else {}
    here = {facts.id for facts, _ in found}
    branches = _branches(found)
    rows = tuple(
        Listed(
            facts,
            verdict,
            _parent(facts) in here,
            facts.id in branches,
            kept.get(facts.id),
            frozenset(facts.manifest.needs if facts.manifest else ()) - here,
        )
        for facts, verdict in found
    )
    return Listing(target.store.root, keep, rows, _quarantined(target), now)


def _kept(
    target: Inspected,
    found: Sequence[tuple[Candidate, Verdict]],
    keep: KeepRules,
    now: float,
    *,
    pruning: bool,
) -> dict[str, tuple[str, ...]]:
    """Why each checkpoint stays, of those that are good in themselves."""
    good = [(facts, verdict) for facts, verdict in found if inspection.sound(verdict)]
    candidates = [
        RetentionEntry.of(facts.manifest, given_up=not verdict.accepted)
        for facts, verdict in good
        if facts.manifest
    ]
    # What the gate would not take now is not ours to delete, nor is what it needs.
    others = [facts for facts, verdict in found if not inspection.sound(verdict)]
    protected: dict[str, str] = {}
    for facts in (*others, *whole(target.store)):
        protected.update((id, f"needed by {facts.id}") for id in _needs(facts, candidates))
    protected |= _newest_that_counts(target.run, [c.id for c in candidates if not c.given_up])
    protected |= _accepted_last(target.run)
    why = retention.explain(candidates, keep, frozenset(protected), now, pruning=pruning)
    return {
        id: tuple(protected[id] if r == retention.PROTECTED else r for r in reasons)
        for id, reasons in why.items()
    }


def _needs(facts: Candidate, candidates: Iterable[RetentionEntry]) -> list[str]:
    """Ids that a checkpoint which is no candidate needs, or may need if that cannot be read."""
    if facts.manifest is not None:
        return list(facts.manifest.needs)
    older = (each.id for each in candidates if newer(facts.id, each.id))
    return list(older) if facts.integrity.unreadable else []


def _accepted_last(run: RunDirectory | None) -> dict[str, str]:
    """What the gate of `run` let the ranks start from most recently, and that as a reason."""
    gates = [e for e in run.events() if isinstance(e, GatePassed)] if run else []
    ids = [gate.accepted for gate in gates[-1:] if gate.accepted]
    return dict.fromkeys(ids, retention.PROTECTED)


def _newest_that_counts(run: RunDirectory | None, ids: Sequence[str]) -> dict[str, str]:
    """The newest of `ids` that is in as many replicas as the job asks for, and that as a reason."""
    how = run.section("checkpoint") if run else {}
    policy, targets = how.get("commit", "local"), how.get("replicas") or ()
    if run is None or policy == "local" or not targets:
        return {}
    from autoglm_resume.supervise.core import history

    known = history.recall(run.events()).replicated
    newest = newest_counting(ids, policy, {target: known.get(target, ()) for target in targets})
    return {newest: f"the newest that counts (commit: {policy})"} if newest else {}


def _parent(facts: Candidate) -> str | None:
    parent = facts.manifest.parent if facts.manifest else None
    return parent.id if parent else None


def _branches(found: Sequence[tuple[Candidate, Verdict]]) -> set[str]:
    """Ids of those that the newest good one does not descend from, as far as that is known.

    A chain reaches back as far as parents are here, and parts name a few more ancestors; what is
    older than all of these may or may not be one.
    """
    chain: set[str] = set()
    for facts, verdict in found:
        if facts.id in chain or (not chain and verdict.accepted):
            lineage = facts.parts[0].lineage if facts.parts else ()
            parent = _parent(facts)
            chain.update((facts.id, *lineage, *([parent] if parent else [])))
    oldest = min(chain, key=recency, default=None)
    ids = (facts.id for facts, _ in found)
    return {id for id in ids if oldest and id not in chain and newer(id, oldest)}


def _quarantined(target: Inspected) -> tuple[tuple[str, str], ...]:
    found = []
    for path in target.store.quarantined():
        reason = "no reason was recorded"
        with suppress(OSError, CheckpointError):
            file = path / REASON
            reason = document.parse(files.read(file, LARGEST_NOTE), str(file))["reason"].text()
        found.append((path.name, reason))
    return tuple(found)


# Shown


def tables(listing: Listing, width: int | None = None) -> list[Table]:
    """One line per checkpoint, in two tables if `width` is too narrow; and the quarantine."""
    table = Table(
        (
            *("checkpoint", "step", "age", "ranks", "raw", "stored", "shared"),
            *("needs", "parent", "metrics", "why kept", "verdict"),
        ),
        right=frozenset((1, 2, 3, 4, 5, 6)),
    )
    for each in listing.checkpoints:
        manifest, good = each.facts.manifest, inspection.sound(each.verdict)
        table.add(
            each.facts.id,
            each.facts.step,
            *(_figures(manifest, listing.now) if manifest else [None] * 5),
            ", ".join(_short(id, here=id not in each.lacking) for id in _needs_of(each)),
            _parent_words(each),
            _metrics(manifest) if manifest else None,
            kept_words(each) if listing.keep else None,
            inspection.word(each.verdict) + ("" if good else f": {failure(each.verdict)}"),
            style="" if good else "red",
        )
    shelter = Table(("in quarantine", "why"))
    for name, reason in listing.quarantined:
        shelter.add(name, short(reason))
    narrow = width is not None and not table.fits(width)
    shown = [table.only(0, 1, 3, 4, 5, 6, 11), table.only(0, 2, 7, 8, 9, 10)] if narrow else [table]
    return [*shown, shelter] if listing.quarantined else shown


def _figures(manifest: Manifest, now: float) -> list[object]:
    sizes = map(size, (manifest.raw, manifest.stored, manifest.shared))
    return [seconds(max(0.0, now - manifest.created)), manifest.world_size, *sizes]


def _metrics(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())


def kept_words(each: Listed) -> str:
    """Why it stays, or that it may go."""
    if each.kept is None:
        return "left alone: not acceptable"
    return ", ".join(each.kept) or "may go"


def failure(verdict: Verdict) -> str:
    """What the gate has against it."""
    return "; ".join(failed_check(CheckMade(**asdict(c))) for c in verdict.checks if not c.ok)


def _parent_words(each: Listed) -> str:
    """“20.a0” for step-0000000020.a0, and what is special about the chain there."""
    words = []
    if parent := _parent(each.facts):
        words.append(_short(parent, here=each.parent_here))
    return ", ".join([*words, *(["branch"] if each.branch else [])])


def _needs_of(each: Listed) -> tuple[str, ...]:
    return tuple(each.facts.manifest.needs) if each.facts.manifest else ()


def _short(id: str, *, here: bool) -> str:
    short = f"{step_of(id)}.{id.partition('.')[2]}"
    return short if here else f"{short} (gone)"


def to_json(listing: Listing) -> dict[str, Any]:
    """Everything that the tables show; sizes in bytes, times in seconds."""
    return {
        "directory": str(listing.root),
        "keep": asdict(listing.keep) if listing.keep else None,
        "checkpoints": [_to_json(each, listing.now) for each in listing.checkpoints],
        "quarantine": [{"name": name, "reason": why} for name, why in listing.quarantined],
    }


def _to_json(each: Listed, now: float) -> dict[str, Any]:
    manifest = each.facts.manifest
    return {
        "id": each.facts.id,
        "step": each.facts.step,
        "created": manifest.created if manifest else None,
        "age": now - manifest.created if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "raw": manifest.raw if manifest else None,
        "stored": manifest.stored if manifest else None,
        "shared": manifest.shared if manifest else None,
        "needs": list(manifest.needs) if manifest else [],
        "lacking": sorted(each.lacking),
        "parent": _parent(each.facts),
        "parent_here": each.parent_here,
        "branch": each.branch,
        "metrics": dict(manifest.metrics) if manifest else {},
        "kept": None if each.kept is None else list(each.kept),
        "accepted": each.verdict.accepted,
        "verdict": each.verdict.reason,
    }
