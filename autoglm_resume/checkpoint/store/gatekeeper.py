"""Passing the gate: finish what a crash left half done, judge, mend, and put what is corrupt away.

It is the same gate for a run under a supervisor, for a script alone and under plain torchrun.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import Branch, recency
from autoglm_resume.checkpoint.format.manifest import MANIFEST, Manifest
from autoglm_resume.checkpoint.store.commit import abandoned, complete, sweep, whole
from autoglm_resume.checkpoint.store.examine import lacking
from autoglm_resume.checkpoint.store.gate import (
    Candidate,
    Choice,
    Expectation,
    Verdict,
    agree,
    choose,
    could_fit,
)
from autoglm_resume.checkpoint.store.proofs import Proofs
from autoglm_resume.checkpoint.store.store import Store, strangers
from autoglm_resume.errors import CheckpointError, NoAcceptableCheckpoint

Repair: TypeAlias = Callable[[str, str | None], list[str]]
"""Replaces the bad files of a checkpoint, given the digest of its manifest; returns which."""
HERE = "here"
"""The only node so far whose verdicts count."""
_NAMED = 3
"""Checkpoints that are named where many are alike."""


@dataclass(frozen=True)
class WaysOut:
    """What a person can do where no checkpoint is acceptable, in words that fit the launcher."""

    world_size: str
    model: str
    fresh: str
    """How to start from step 0."""


class Gatekeeper:
    """The checks before every start of the ranks that write to one directory of checkpoints.

    `tell` hears:
        gate         verdicts, accepted (an id or None), step, seconds
        committed    id, step, digest, objects: a commit that a crash had left undone
        quarantined  id, step, reason
        warning      text
    """

    def __init__(
        self,
        store: Store,
        expectation: Expectation,
        tell: events.Tell,
        ways_out: WaysOut,
        checkpointed: int = 0,
    ) -> None:
        """`checkpointed` is the step of the newest checkpoint that ever was, 0 without one."""
        self.store = store
        self.checkpointed = checkpointed
        self._expectation = expectation
        self._tell = tell
        self._ways_out = ways_out
        self._repair: Repair | None = None
        self._proofs = Proofs(store)
        self._abandoned: list[Path] = []
        self._strange: set[Path] = set()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """(step, attempt) where newer checkpoints were left behind on purpose."""
        return self._expectation.branches

    def repair_with(self, repair: Repair) -> None:
        """Have what is corrupt mended by `repair`, before anything older is taken."""
        self._repair = repair

    def refuse(self, id: str, reason: str) -> None:
        """A rank could not load what the gate had accepted, because it is damaged."""
        refused = {**self._expectation.refused, id: reason}
        self._expectation = replace(self._expectation, refused=refused)

    def admit(self, in_memory: Candidate | None = None) -> Verdict | None:
        """The checkpoint to start from, None to start from step 0. No rank may be alive.

        `in_memory` is what ranks left there, perhaps still being written. Raises
        NoAcceptableCheckpoint, having changed nothing, if there are only unacceptable ones.
        """
        began = time.monotonic()
        self._complete()
        if in_memory is not None and (Path(in_memory.path) / MANIFEST).exists():
            in_memory = None  # it is on storage by now
        self._say_what_is_not_ours()
        found = abandoned(self.store)
        self._abandoned = [p for p in found if in_memory is None or p.name != in_memory.id]
        choice = self._mended(self.judge(in_memory=in_memory), in_memory)
        accepted = agree({HERE: choice.verdicts})
        self._tell(
            events.GatePassed(
                verdicts=tuple(events.Judged.from_json(v.to_json()) for v in choice.verdicts),
                accepted=accepted.id if accepted else None,
                step=accepted.step if accepted else 0,
                seconds=time.monotonic() - began,
            )
        )
        if accepted is None:
            self.require_a_fresh_start(choice)
            return None
        for verdict in choice.verdicts:
            if verdict.corrupt and not self._needed(verdict.id) and not self._lacks(verdict):
                self._quarantine(verdict)
        return accepted

    def _say_what_is_not_ours(self) -> None:
        for path in self.store.uncommitted():
            if path not in self._strange and (found := strangers(path)):
                self._strange.add(path)
                names = ", ".join(sorted(each.name for each in found)[:3])
                text = f"{path}: named like a checkpoint, and holds what is none: {names}"
                self._tell(events.WarningGiven(text=f"{text}; left alone"))

    def clean(self) -> None:
        """Remove what was abandoned when the gate was passed; ranks may run by now."""
        with contextlib.suppress(OSError):
            sweep(self.store, self._abandoned)
        self._abandoned = []

    def judge(self, *, every: bool = False, in_memory: Candidate | None = None) -> Choice:
        """Verdicts, without changing anything."""
        # What fits was committed just now; what is whole and does not fit is still somebody's.
        unfit = [f for f in whole(self.store) if not could_fit(f.manifest, self._expectation)]
        committed = map(self._proofs.facts, self.store.committed())
        here = [] if in_memory is None else [in_memory]
        candidates = heapq.merge(here, unfit, committed, key=lambda f: recency(f.id), reverse=True)
        return choose(candidates, self._expectation, every=every)

    def require_a_fresh_start(self, choice: Choice) -> None:
        """Raise NoAcceptableCheckpoint unless there never was one, so that step 0 is right."""
        directory, fresh = self.store.root, self._ways_out.fresh
        if choice.verdicts:
            alike: dict[str, list[str]] = {}
            for verdict in choice.verdicts:
                alike.setdefault(verdict.reason, []).append(verdict.id)
            lines = [f"  {_few(ids)}: {reason}" for reason, ids in alike.items()]
            raise NoAcceptableCheckpoint(
                f"{directory}: checkpoints are there, but none is acceptable; nothing was changed\n"
                + "\n".join(lines),
                hint="; ".join((*self._ways(choice), f"or {fresh}")),
            )
        if self.store.quarantined() or self.checkpointed:
            raise NoAcceptableCheckpoint(
                f"{directory}: expected the checkpoint of step {self.checkpointed} or an older "
                "one, found none; nothing was changed",
                hint=f"is the file system mounted? Put a checkpoint back, or {fresh}",
            )

    def _ways(self, choice: Choice) -> list[str]:
        failed = {check.name for v in choice.verdicts for check in v.checks if not check.ok}
        ways = {
            "integrity": "restore the damaged files from a copy",
            "world size": self._ways_out.world_size,
            "model hash": self._ways_out.model,
        }
        return [way for name, way in ways.items() if name in failed]

    def _mended(self, choice: Choice, in_memory: Candidate | None) -> Choice:
        """The same, after replicas have mended what they can: better than to fall back."""
        mended = False
        for verdict in choice.verdicts:
            if verdict.corrupt and self._repair is not None:
                known = self._proofs.forget(Path(verdict.path))
                manifest = known.manifest if known else None
                if self._repair(verdict.id, manifest.digest if manifest else None):
                    self._no_longer_refused(verdict.id)
                    mended = True
        return self.judge(in_memory=in_memory) if mended else choice

    def _no_longer_refused(self, id: str) -> None:
        refused = {other: why for other, why in self._expectation.refused.items() if other != id}
        self._expectation = replace(self._expectation, refused=refused)

    def _complete(self) -> None:
        try:
            manifests = complete(self.store, lambda m: could_fit(m, self._expectation))
        except OSError as error:
            # Only what was not committed yet is lost by going on, as with any other crash.
            text = f"{self.store.root}: could not commit what is there: {error}"
            self._tell(events.WarningGiven(text=text))
            return
        for manifest in manifests:
            self._announce(manifest)

    def _announce(self, manifest: Manifest) -> None:
        self._tell(
            events.Committed(
                id=manifest.id,
                step=manifest.step,
                digest=manifest.digest,
                objects=manifest.objects,
            )
        )
        self.checkpointed = max(self.checkpointed, manifest.step)

    def _needed(self, id: str) -> bool:
        """Whether another checkpoint, which may be good, has chunks in the packs of this one."""
        for path in self.store.committed():
            with contextlib.suppress(CheckpointError):
                needs = self.store.load_manifest(path).needs
                if id in needs and path.name not in self._expectation.refused:
                    return True
        return False

    def _lacks(self, verdict: Verdict) -> bool:
        """Whether it is whole but for another checkpoint, which may be put back."""
        with contextlib.suppress(CheckpointError):
            return bool(lacking(self.store, self.store.load_manifest(Path(verdict.path))))
        return False

    def _quarantine(self, verdict: Verdict) -> None:
        try:
            self.store.quarantine(verdict.id, verdict.reason)
        except OSError as error:
            # It stays where it is and is rejected again next time.
            self._tell(
                events.WarningGiven(text=f"{verdict.path}: could not be quarantined: {error}")
            )
        else:
            self._tell(events.Quarantined(id=verdict.id, step=verdict.step, reason=verdict.reason))


def _few(ids: Sequence[str]) -> str:
    more = len(ids) - _NAMED
    return ", ".join(ids[:_NAMED]) + (f" and {more} more" if more > 0 else "")
