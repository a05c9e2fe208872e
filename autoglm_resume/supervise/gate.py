"""Passing the gate: finish what a crash left half done, judge, and put what is corrupt away."""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from autoglm_resume import files
from autoglm_resume.checkpoint.format.ids import recency, step_of
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.store.gate import (
    Choice,
    Expectation,
    Facts,
    Integrity,
    Verdict,
    choose,
    superseded,
)
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.errors import CheckpointError, NoAcceptableCheckpoint
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.supervise.core.history import Model

Stats: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


@dataclass
class Gatekeeper:
    """The checks before every start of the ranks of one run."""

    job: Job
    world_size: int
    tell: Callable[..., object]
    model: Model | None = None
    checkpointed: int = 0
    """Step of the newest checkpoint this run ever committed, 0 without one."""
    refused: dict[str, str] = field(default_factory=dict)
    """What ranks would not load, by id."""
    repair: Callable[[str, str | None], list[str]] | None = None
    """Replaces bad files of a checkpoint, given the digest of its manifest; returns which."""
    branches: tuple[tuple[int, int], ...] = ()
    """Where the run left newer checkpoints behind on purpose; see `history.History`."""

    def __post_init__(self) -> None:
        self._abandoned: list[Path] = []
        self._proven: dict[Path, tuple[Stats, Facts]] = {}
        self._announced: set[str] = set()
        self._not_from_memory: set[str] = set()
        self.store = Store(Path(self.job.checkpoint.dir))

    def pass_gate(self, sealed: Sealed | None = None) -> ResumePoint | None:
        """The checkpoint to start from, None to start from step 0. No rank may be alive.

        `sealed` is what the ranks left in memory, perhaps still being written. Raises
        NoAcceptableCheckpoint, having changed nothing, if there are only unacceptable ones.
        """
        began = time.monotonic()
        self._complete()
        if sealed is not None and (self.store.directory(sealed.id) / MANIFEST).exists():
            sealed = None  # it is on storage by now
        found = self.store.abandoned()
        self._abandoned = [p for p in found if sealed is None or p.name != sealed.id]
        choice = self._repaired(self.judge(sealed=sealed), sealed)
        accepted = choice.accepted
        self.tell(
            "gate",
            verdicts=[verdict.to_json() for verdict in choice.verdicts],
            accepted=accepted.id if accepted else None,
            step=accepted.step if accepted else 0,
            seconds=time.monotonic() - began,
        )
        if accepted is None:
            self.require_a_fresh_start(choice)
            return None
        if accepted.manifest is not None and accepted.id not in self._announced:
            # Whoever committed it died before saying so.
            self._announce(accepted.manifest)
        for verdict in choice.verdicts:
            if verdict.corrupt and not self._needed(verdict.id):
                self._quarantine(verdict)
        if accepted.manifest is None:
            assert sealed is not None
            return ResumePoint(sealed.id, sealed.step, "", sealed.seals)
        return ResumePoint(accepted.id, accepted.step, accepted.manifest.digest)

    def go_back(self, before: int | None, attempt: int) -> None:
        """Have the gate take an older checkpoint than that of step `before`, or than the newest.

        What attempts before `attempt` saved after it is of a branch given up. Without an older
        acceptable one nothing changes. What ranks left in memory must be on storage.
        """
        self._complete()
        newest = self._newest_step(before)
        older = newest if before is not None or newest is None else self._newest_step(newest)
        if older is None:
            self.tell("warning", text="there is no older acceptable checkpoint to go back to")
        else:
            self.branch(older, attempt, reason="what was saved since may be bad")

    def branch(self, step: int, attempt: int, **fields: str) -> None:
        """Go on from `step` in `attempt`; `history.recall` knows what the journal then says."""
        self.tell("branched", step=step, **fields)
        self.branches = (*self.branches, (step, attempt))
        self.checkpointed = step

    def _newest_step(self, before: int | None) -> int | None:
        """Of the acceptable checkpoints on storage that are older than step `before`."""
        paths = self.store.committed()
        there = (self._examine(p) for p in paths if before is None or step_of(p.name) < before)
        accepted = choose(there, self._expectation(self.refused)).accepted
        return accepted.step if accepted else None

    def may_take_from_memory(self, id: str) -> bool:
        """Whether ranks that were told to have not failed to."""
        return id not in self._not_from_memory

    def refuse(self, point: ResumePoint, reason: str) -> None:
        """A rank could not load what the gate had accepted, because it is damaged."""
        if point.seals:  # what is on storage may be good
            self._not_from_memory.add(point.id)
        else:
            self.refused[point.id] = reason

    def _repaired(self, choice: Choice, sealed: Sealed | None) -> Choice:
        """The same, after replicas have mended what they can: better than to fall back."""
        mended = False
        for verdict in choice.verdicts:
            if verdict.corrupt and self.repair is not None:
                facts = self._proven.pop(Path(verdict.path), None)
                manifest = facts[1].manifest if facts else None
                if self.repair(verdict.id, manifest.digest if manifest else None):
                    self.refused.pop(verdict.id, None)
                    mended = True
        return self.judge(sealed=sealed) if mended else choice

    def clean(self) -> None:
        """Remove what was abandoned when the gate was passed; ranks may run by now."""
        with contextlib.suppress(OSError):
            self.store.sweep(self._abandoned)
        self._abandoned = []

    def newest(self) -> ResumePoint | None:
        """What the gate would take now. No rank may be alive."""
        self._complete()
        accepted = self.judge().accepted
        if accepted is None or accepted.manifest is None:
            return None
        return ResumePoint(accepted.id, accepted.step, accepted.manifest.digest)

    def judge(self, *, every: bool = False, sealed: Sealed | None = None) -> Choice:
        """Verdicts, without changing anything."""
        # What fits was committed just now; what is whole and does not fit is still somebody's.
        unfit = [facts for facts in self.store.whole() if not self._fits(facts.manifest)]
        committed = (self._examine(path) for path in self.store.committed())
        here = [] if sealed is None else [_facts(sealed, self.store.directory(sealed.id))]
        candidates = heapq.merge(here, unfit, committed, key=lambda f: recency(f.id), reverse=True)
        return choose(candidates, self._expectation(self.refused), every=every)

    def present(self) -> list[str]:
        """Ids of the committed checkpoints that are of no branch that was given up."""
        ids = (path.name for path in self.store.committed())
        return [id for id in ids if superseded(id, self.branches) is None]

    def read_ahead(self) -> None:
        """Let what the gate will most likely take be in memory by the time ranks read it.

        Packs are written past the page cache: 240 MB a rank took 0.75 s from the disk, 0.2 s so.
        """
        newest = self.store.latest()
        if newest is None:
            return
        with contextlib.suppress(CheckpointError):
            needs = map(self.store.directory, self.store.load_manifest(newest).needs)
            files.read_ahead([pack for place in (newest, *needs) for pack in place.glob("*.pack")])

    def notice(self, id: str, step: int) -> bool:
        """A saver committed this; returns whether that is new, every saver may say so.

        Examine it now, while training runs, rather than at a restart.
        """
        new = id not in self._announced
        self._announced.add(id)
        self.checkpointed = max(self.checkpointed, step)
        with contextlib.suppress(OSError):
            self._examine(self.store.directory(id))
        return new

    def _examine(self, path: Path) -> Facts:
        """Facts about a checkpoint, kept for as long as no file changes that it needs."""
        known = self._proven.get(path)
        if known is not None and known[0] == self._stats(path, known[1]):
            return known[1]
        facts = replace(self.store.examine(path), parts=())
        if facts.integrity.ok:
            here = {p: v for p, v in self._proven.items() if p.exists()}
            self._proven = {**here, path: (self._stats(path, facts), facts)}
        return facts

    def _stats(self, path: Path, facts: Facts) -> Stats:
        needs = facts.manifest.needs if facts.manifest else ()
        places = [path, *(self.store.directory(id) for id in needs)]
        return tuple(stat for place in places for stat in _stats(place))

    def _complete(self) -> None:
        try:
            manifests = self.store.complete(self._fits)
        except OSError as error:
            # Only what was not committed yet is lost by going on, as with any other crash.
            self.tell("warning", text=f"{self.store.root}: could not commit what is there: {error}")
            return
        for manifest in manifests:
            self._announce(manifest)

    def _announce(self, manifest: Manifest) -> None:
        self.tell(
            "committed",
            id=manifest.id,
            step=manifest.step,
            digest=manifest.digest,
            objects=manifest.objects,
        )
        self._announced.add(manifest.id)
        self.checkpointed = max(self.checkpointed, manifest.step)

    def _fits(self, manifest: Manifest | None) -> bool:
        if manifest is None:
            return False
        guards, how, model = self.job.guards, self.job.checkpoint, self.model
        world_fits = manifest.world_size == self.world_size or guards.world_size != "strict"
        model_fits = model is None or manifest.model_hash == model.hash or guards.model == "off"
        # Only a rank can say whether it fits when it is renamed, or what of it does.
        model_fits = model_fits or bool(how.rename) or not how.strict
        return world_fits and model_fits

    def _needed(self, id: str) -> bool:
        """Whether another checkpoint, which may be good, has chunks in the packs of this one."""
        for path in self.store.committed():
            with contextlib.suppress(CheckpointError):
                if id in self.store.load_manifest(path).needs and path.name not in self.refused:
                    return True
        return False

    def _quarantine(self, verdict: Verdict) -> None:
        try:
            self.store.quarantine(verdict.id, verdict.reason)
        except OSError as error:
            # It stays where it is and is rejected again next time.
            self.tell("warning", text=f"{verdict.path}: could not be quarantined: {error}")
        else:
            self.tell("quarantined", id=verdict.id, step=verdict.step, reason=verdict.reason)

    def _expectation(self, refused: Mapping[str, str]) -> Expectation:
        guards = self.job.guards
        return Expectation(
            world_size=self.world_size,
            model_hash=self.model.hash if self.model else None,
            model=self.model.structure if self.model else None,
            check_world_size=guards.world_size != "off",
            elastic=guards.world_size == "elastic",
            check_model=guards.model == "strict" and self.job.checkpoint.strict,
            rename=self.job.checkpoint.rename,
            refused=refused,
            branches=self.branches,
        )

    def require_a_fresh_start(self, choice: Choice) -> None:
        """Raise NoAcceptableCheckpoint unless there never was one, so that step 0 is right."""
        directory = self.store.root
        if choice.verdicts:
            lines = [f"  {verdict.id}: {verdict.reason}" for verdict in choice.verdicts]
            raise NoAcceptableCheckpoint(
                f"{directory}: checkpoints are there, but none is acceptable; nothing was changed\n"
                + "\n".join(lines),
                hint="; ".join(_ways_out(choice))
                + "; or start over with `autoglm run --fresh`, which keeps the old files",
            )
        if self.store.quarantined() or self.checkpointed:
            raise NoAcceptableCheckpoint(
                f"{directory}: expected the checkpoint of step {self.checkpointed} or an older "
                "one, found none; nothing was changed",
                hint="is the file system mounted? Put a checkpoint back, or start over with "
                "`autoglm run --fresh`",
            )


def _facts(sealed: Sealed, path: Path) -> Facts:
    return Facts(
        id=sealed.id,
        step=sealed.step,
        path=str(path),
        created=sealed.created,
        world_size=len(sealed.seals),
        model_hash=sealed.model_hash,
        model=None,
        integrity=Integrity(True, "memory"),
        raw=sealed.raw,
        stored=0,
    )


def _stats(path: Path) -> Stats:
    """Of every file, as far as a change of its content shows there.

    A manifest's ctime changes once more when its writer removes the temporary name, while others
    may have reported it already; a pack keeps its ctime from before its part was written.
    """
    if not path.is_dir():
        return ()
    with os.scandir(path) as entries:
        found = [(e.name, e.stat()) for e in entries if not e.name.startswith(files.TEMPORARY)]
    return tuple(
        sorted(
            (
                name,
                s.st_size,
                s.st_mtime_ns,
                s.st_ctime_ns if name.endswith(".pack") else 0,
                s.st_ino,
            )
            for name, s in found
        )
    )


def _ways_out(choice: Choice) -> list[str]:
    failed = {check.name for v in choice.verdicts for check in v.checks if not check.ok}
    ways = {
        "integrity": "restore the damaged files from a copy",
        "world size": "run with the number of ranks that made the checkpoints "
        "(nproc_per_node), or set guards.world_size: elastic",
        "model hash": "go back to the model that made the checkpoints, or point checkpoint.dir "
        "elsewhere",
    }
    return [way for name, way in ways.items() if name in failed]
