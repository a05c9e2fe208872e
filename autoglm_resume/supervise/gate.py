"""The gate of a run: what only a supervisor knows of checkpoints, and asks of the gatekeeper."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from autoglm_resume import events, files
from autoglm_resume.checkpoint.format.ids import Branch, step_of
from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.store.gate import (
    Candidate,
    Expectation,
    Integrity,
    choose,
    superseded,
)
from autoglm_resume.checkpoint.store.gatekeeper import Gatekeeper, WaysOut
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.errors import CheckpointError
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.supervise.core.history import History, Model, model_of

WAYS_OUT = WaysOut(
    world_size="run with the number of ranks that made the checkpoints (nproc_per_node), or set "
    "guards.world_size: elastic",
    model="go back to the model that made the checkpoints, or point checkpoint.dir elsewhere",
    fresh="start over with `autoglm run --fresh`, which keeps the old files",
)


class RunGate(Gatekeeper):
    """The checks before every start of the ranks of one run."""

    def __init__(self, job: Job, world_size: int, tell: events.Tell, past: History) -> None:
        """`tell` hears what a gatekeeper tells, and

        branched    step, and for a reason of the supervisor's own: reason
        """
        super().__init__(
            Store(Path(job.checkpoint.dir)),
            _expectation(job, world_size, past),
            tell,
            WAYS_OUT,
            past.checkpointed,
        )
        self._announced = set(past.announced)
        best = job.checkpoint.keep.best
        self._ranked_by = best.metric if best else ""
        self._not_from_memory: set[str] = set()

    def pass_gate(self, sealed: Sealed | None = None) -> ResumePoint | None:
        """What to start from, None to start from step 0; see `admit`.

        `sealed` is what the ranks left in memory, perhaps still being written.
        """
        in_memory = _facts(sealed, self.store.directory(sealed.id)) if sealed else None
        accepted = self.admit(in_memory)
        if accepted is None:
            return None
        if not accepted.digest:
            assert sealed is not None
            return ResumePoint(sealed.id, sealed.step, "", sealed.seals)
        manifest = self._proofs.facts(Path(accepted.path)).manifest
        if manifest is not None and accepted.id not in self._announced:
            # Whoever committed it died before saying so.
            self._announce(manifest)
        return ResumePoint(accepted.id, accepted.step, accepted.digest)

    def expect_model(self, model: Model | None) -> None:
        """The model that the ranks reported; None while it is not known as a whole."""
        self._expectation = replace(
            self._expectation,
            model_hash=model.hash if model else None,
            model=model.structure if model else None,
        )

    def go_back(self, before: int | None, attempt: int) -> None:
        """Have the gate take an older checkpoint than that of step `before`, or than the newest.

        What attempts before `attempt` saved after it is of a branch given up. Without an older
        acceptable one nothing changes. What ranks left in memory must be on storage.
        """
        self._complete()
        newest = self._newest_step(before)
        older = newest if before is not None or newest is None else self._newest_step(newest)
        if older is None:
            self._tell(
                events.WarningGiven(text="there is no older acceptable checkpoint to go back to")
            )
        else:
            self.branch(older, attempt, reason="what was saved since may be bad")

    def branch(self, step: int, attempt: int, reason: str = "") -> None:
        """Go on from `step` in `attempt`; `history.recall` knows what the journal then says."""
        self._tell(events.Branched(step=step, reason=reason))
        branches = (*self.branches, Branch(step, attempt))
        self._expectation = replace(self._expectation, branches=branches)
        self.checkpointed = step

    def _newest_step(self, before: int | None) -> int | None:
        """Of the acceptable checkpoints on storage that are older than step `before`."""
        paths = self.store.committed()
        there = (self._proofs.facts(p) for p in paths if before is None or step_of(p.name) < before)
        accepted = choose(there, self._expectation).accepted
        return accepted.step if accepted else None

    def may_take_from_memory(self, id: str) -> bool:
        """Whether ranks that were told to have not failed to."""
        return id not in self._not_from_memory

    def not_loaded(self, point: ResumePoint, reason: str) -> None:
        """A rank could not load what the gate had accepted, because it is damaged."""
        if point.seals:  # what is on storage may be good
            self._not_from_memory.add(point.id)
        else:
            self.refuse(point.id, reason)

    def newest(self) -> ResumePoint | None:
        """What the gate would take now. No rank may be alive."""
        self._complete()
        accepted = self.judge().accepted
        if accepted is None or accepted.manifest is None:
            return None
        return ResumePoint(accepted.id, accepted.step, accepted.manifest.digest)

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
            files.read_ahead([pack for path in (newest, *needs) for pack in path.glob("*.pack")])

    def notice(self, id: str, step: int) -> bool:
        """A saver committed this; returns whether that is new, every saver may say so.

        Examine it now, while training runs, rather than at a restart.
        """
        new = id not in self._announced
        self._announced.add(id)
        self.reached(step)
        with contextlib.suppress(OSError):
            facts = self._proofs.facts(self.store.directory(id))
            self._look_for_figure(facts)
        return new

    def _look_for_figure(self, facts: Candidate) -> None:
        """Say, once, if `keep.best` cannot rank what was saved: the name may be wrong."""
        metric, manifest = self._ranked_by, facts.manifest
        if metric and manifest is not None and metric not in manifest.metrics:
            self._ranked_by = ""
            has = ", ".join(manifest.metrics) or "none"
            text = (
                f"checkpoint.keep.best ranks by {metric!r}, which was not reported with step "
                f"{facts.step} (its figures: {has}); only checkpoints that have it are kept for it"
            )
            self._tell(events.WarningGiven(text=text))

    def reached(self, step: int) -> None:
        """There is, or was, a checkpoint of `step`."""
        self.checkpointed = max(self.checkpointed, step)

    def _announce(self, manifest: Manifest) -> None:
        super()._announce(manifest)
        self._announced.add(manifest.id)


def _expectation(job: Job, world_size: int, past: History) -> Expectation:
    guards, how = job.guards, job.checkpoint
    model = model_of(past.models, world_size)
    return Expectation(
        world_size=world_size,
        model_hash=model.hash if model else None,
        model=model.structure if model else None,
        check_world_size=guards.world_size != "off",
        elastic=guards.world_size == "elastic",
        check_model=guards.model == "strict" and how.strict,
        rename=how.rename,
        branches=past.branches,
    )


def _facts(sealed: Sealed, path: Path) -> Candidate:
    return Candidate(
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
