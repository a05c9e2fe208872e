"""The gate: which checkpoint may be loaded, and why not the others. Pure.

    candidates + what this run expects  ->  a verdict per candidate, and a choice

Checks, in this order: integrity, branch, world size, model hash. What cannot be known because the
manifest is unreadable is not checked: integrity has already failed then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Literal, TypeAlias

from autoglm_resume.checkpoint.format import renaming
from autoglm_resume.checkpoint.format.document import Json
from autoglm_resume.checkpoint.format.ids import Branch, attempt_of, is_id, step_of
from autoglm_resume.checkpoint.format.manifest import Manifest
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.structure import Structure, differences

CheckName: TypeAlias = Literal["integrity", "world size", "model hash", "branch"]


@dataclass(frozen=True)
class Expectation:
    """What a checkpoint must fit. `model_hash` is None before any worker has reported one.

    `elastic` takes any world size, as does not checking it, but says what it means.
    `refused` maps ids to reasons: what ranks found bad while loading, after the gate let it pass.
    """

    world_size: int
    model_hash: str | None = None
    model: Structure | None = None
    check_world_size: bool = True
    elastic: bool = False
    check_model: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    """(step, attempt) from where the run went on from an older checkpoint, as it was asked to."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """New names of parameters, by old ones; see format/renaming.py."""


@dataclass(frozen=True)
class Integrity:
    """`how` the bytes are known to be good; `problem` is empty when they are.

    `unreadable` says that it is unusable here and now (a newer format, no permission, a failing
    disk), but not proven to be bad.
    """

    ok: bool
    how: Literal["fingerprint", "content", "memory"]
    problem: str = ""
    unreadable: bool = False


@dataclass(frozen=True)
class Candidate:
    """What was found out about one candidate; `raw` and `stored` are bytes of all ranks."""

    id: str
    step: int
    path: str
    created: float
    world_size: int | None
    model_hash: str | None
    model: Structure | None
    integrity: Integrity
    raw: int
    stored: int
    manifest: Manifest | None = None
    parts: tuple[Part, ...] = field(default=(), repr=False)
    """As far as they could be read."""

    @classmethod
    def of(
        cls,
        path: PurePath,
        manifest: Manifest | None,
        parts: Sequence[Part],
        integrity: Integrity,
    ) -> Candidate:
        """Of the checkpoint at `path`; `manifest` is None where that cannot be read."""
        id = path.name
        return cls(
            id=id,
            step=manifest.step if manifest else step_of(id) if is_id(id) else 0,
            path=str(path),
            created=manifest.created if manifest else 0.0,
            world_size=manifest.world_size if manifest else None,
            model_hash=manifest.model_hash if manifest else None,
            model=next((part.model for part in parts if part.model), None),
            integrity=integrity,
            raw=manifest.raw if manifest else 0,
            stored=manifest.stored if manifest else 0,
            manifest=manifest,
            parts=tuple(parts),
        )


@dataclass(frozen=True)
class GateCheck:
    name: CheckName
    ok: bool
    expected: str
    found: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.name}: expected {self.expected}, found {self.found}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True)
class Verdict:
    id: str
    step: int
    path: str
    accepted: bool
    checks: tuple[GateCheck, ...]
    corrupt: bool = False
    """Its bytes are bad, so that it belongs into quarantine, rather than only not fitting."""
    digest: str = ""
    """Of its manifest, as far as it has a good one: what nodes that judged it alike have seen."""

    @property
    def reason(self) -> str:
        """One sentence: what failed, or what it was accepted on."""
        if self.accepted:
            return "accepted: " + ", ".join(f"{c.name} {c.found}" for c in self.checks)
        return "rejected: " + "; ".join(str(check) for check in self.checks if not check.ok)

    def to_json(self) -> Json:
        return {**asdict(self), "checks": list(map(asdict, self.checks)), "reason": self.reason}


@dataclass(frozen=True)
class Choice:
    """Verdicts in the order of the candidates; `accepted` is the first that passed."""

    verdicts: tuple[Verdict, ...]
    accepted: Candidate | None


def judge(candidate: Candidate, expectation: Expectation) -> Verdict:
    """All checks that can be made on one candidate."""
    checks = [_integrity(candidate, expectation), *_branch(candidate, expectation)]
    if candidate.world_size is not None:
        checks.append(_world_size(candidate.world_size, expectation))
        checks.append(_model(candidate, expectation))
    return Verdict(
        id=candidate.id,
        step=candidate.step,
        path=candidate.path,
        accepted=all(check.ok for check in checks),
        checks=tuple(checks),
        corrupt=not checks[0].ok and not candidate.integrity.unreadable,
        digest=candidate.manifest.digest if candidate.manifest else "",
    )


def choose(
    candidates: Iterable[Candidate], expectation: Expectation, *, every: bool = False
) -> Choice:
    """The first acceptable candidate (they come newest first).

    Stops asking for candidates there, since proving one can cost a read of all its bytes; with
    `every`, judges them all.
    """
    verdicts: list[Verdict] = []
    accepted: Candidate | None = None
    for candidate in candidates:
        verdict = judge(candidate, expectation)
        verdicts.append(verdict)
        if verdict.accepted and accepted is None:
            accepted = candidate
            if not every:
                break
    return Choice(tuple(verdicts), accepted)


def agree(verdicts: Mapping[str, Sequence[Verdict]]) -> Verdict | None:
    """The newest checkpoint that all nodes accept, None if there is none; of one node, its choice.

    Every node's verdicts come newest first. A node that stopped judging at the first that it
    accepts may miss what others can agree on: several nodes judge `every` candidate.
    """
    if not verdicts:
        return None
    first, *others = verdicts.values()
    # Disks of their own may have different bytes under one name.
    accepted = [{(v.id, v.digest) for v in each if v.accepted} for each in others]
    return next(
        (v for v in first if v.accepted and all((v.id, v.digest) in each for each in accepted)),
        None,
    )


def could_fit(manifest: Manifest | None, expectation: Expectation) -> bool:
    """Whether the run may commit what is whole and lacks only this manifest.

    As far as can be known before a rank has seen it: only that can say whether it fits when it is
    renamed, or what of it does.
    """
    if manifest is None:
        return False
    world_fits = (
        manifest.world_size == expectation.world_size
        or expectation.elastic
        or not expectation.check_world_size
    )
    model_fits = (
        expectation.model_hash in (None, manifest.model_hash)
        or not expectation.check_model
        or bool(expectation.rename)
    )
    return world_fits and model_fits


def _integrity(candidate: Candidate, expectation: Expectation) -> GateCheck:
    expected = "every byte as written"
    if candidate.id in expectation.refused:
        detail = f"found while loading: {expectation.refused[candidate.id]}"
        return GateCheck("integrity", False, expected, "refused by a rank", detail)
    if not candidate.integrity.ok:
        found = "unreadable" if candidate.integrity.unreadable else "damage"
        return GateCheck("integrity", False, expected, found, candidate.integrity.problem)
    found = (
        "sealed in memory"
        if candidate.integrity.how == "memory"
        else f"verified by {candidate.integrity.how}"
    )
    return GateCheck("integrity", True, expected, found)


def superseded(id: str, branches: Iterable[Branch]) -> int | None:
    """The step from which the branch was given up that checkpoint `id` is of."""
    if not is_id(id):  # somebody's copy under a name of its own
        return None
    step, attempt = step_of(id), attempt_of(id)
    given_up = (b.step for b in branches if step > b.step and attempt < b.attempt)
    return next(given_up, None)


def _branch(candidate: Candidate, expectation: Expectation) -> list[GateCheck]:
    step = superseded(candidate.id, expectation.branches)
    if step is None:
        return []
    found = f"a branch that was given up for another one from step {step}"
    return [GateCheck("branch", False, "the run's present one", found)]


def _world_size(found: int, expectation: Expectation) -> GateCheck:
    expected = expectation.world_size
    if not expectation.check_world_size:
        return GateCheck("world size", True, "any", str(found), "not checked, as the job asks")
    if expectation.elastic and found != expected:
        ranks = "1 rank" if found == 1 else f"{found} ranks"
        text = f"{ranks} in the checkpoint, {expected} now: resharded"
        return GateCheck("world size", True, "any", text)
    return GateCheck("world size", found == expected, str(expected), str(found))


def _model(candidate: Candidate, expectation: Expectation) -> GateCheck:
    found = candidate.model_hash or "none"
    if not expectation.check_model:
        return GateCheck("model hash", True, "any", found, "not checked, as the job asks")
    if expectation.model_hash is None:
        return GateCheck("model hash", True, "any", found, "no worker has reported its model yet")
    if candidate.model_hash == expectation.model_hash:
        return GateCheck("model hash", True, expectation.model_hash, found)
    detail = ""
    if candidate.model and expectation.model:
        theirs = renaming.applied(candidate.model, expectation.rename)
        if candidate.model.hash == candidate.model_hash and theirs.hash == expectation.model_hash:
            return GateCheck("model hash", True, theirs.hash, found, "the same after renaming")
        lines = differences(theirs, expectation.model)
        detail = "; ".join(lines) or "rank 0 agrees, another rank's model differs"
    return GateCheck("model hash", False, expectation.model_hash, found, detail)
