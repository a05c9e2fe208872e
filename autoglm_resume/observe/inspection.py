"""Checkpoints as people inspect them. They are untrusted input: no pickle, and no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoglm_resume import output
from autoglm_resume.checkpoint.chunks.reader import QUARANTINE
from autoglm_resume.checkpoint.format.ids import is_id
from autoglm_resume.checkpoint.format.manifest import MANIFEST
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import Tensor
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.gate import Candidate, Expectation, GateCheck, Verdict, judge
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import CheckpointError, UsageError
from autoglm_resume.events import CheckMade, RunStarted
from autoglm_resume.observe.progress import Progress
from autoglm_resume.observe.pure.say import check as failed_check
from autoglm_resume.observe.pure.say import plural, short, size
from autoglm_resume.observe.tables import Table
from autoglm_resume.protocol.relocation import same
from autoglm_resume.supervise.base import home
from autoglm_resume.supervise.base.run_directory import RunDirectory, last_run

_BRING_BACK = (
    "To bring copies back, name their target in checkpoint.replicas of a job whose directory of"
    " checkpoints is empty: autoglm run then takes the newest"
)


@dataclass(frozen=True)
class Inspected:
    """The checkpoints that a path means, newest first, and the run they belong to, if one does."""

    store: Store
    paths: tuple[Path, ...]
    run: RunDirectory | None
    single: bool
    """Whether the path names one checkpoint, rather than a directory of them."""


@dataclass(frozen=True)
class Link:
    """A checkpoint's ancestor."""

    id: str
    digest: str
    state: str
    """`here`, or why it is not what the chain says."""


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, looked at from all sides."""

    facts: Candidate
    verdict: Verdict
    parts: tuple[Part, ...]
    chain: tuple[Link, ...]

    @property
    def tensors(self) -> list[tuple[int, Tensor]]:
        """(rank, tensor), in the order of the parts."""
        return [(part.rank, tensor) for part in self.parts for tensor in part.tensors]


def find(given: Path) -> Inspected:
    """What `given` means: a checkpoint, a directory of checkpoints, or a run.

    Raises UsageError if it is none of them.
    """
    path = given.absolute()
    scheme, *rest = given.parts or ("",)
    if scheme in ("s3:", "gs:", "az:"):
        raise UsageError(
            f"{scheme}//{'/'.join(rest)}: expected a directory, found object storage",
            hint=_BRING_BACK,
        )
    if not path.exists():
        raise UsageError(f"{given}: no such file or directory")
    if not path.is_dir():
        raise UsageError(
            f"{given}: expected a checkpoint directory, found a file",
            hint=f"try its directory: autoglm inspect ckpt {given.parent}",
        )
    if (path / MANIFEST).exists() or is_id(path.name):
        root = path.parent
        return Inspected(Store(root), (path,), _run_of(root), single=True)
    run = RunDirectory(path)
    if run.exists:
        store = Store(home.checkpoints(run))
    else:
        store = Store(path)
        if not store.committed() and not store.uncommitted() and not (path / QUARANTINE).is_dir():
            _require_no_replicas(given)
            raise UsageError(
                f"{given}: expected a checkpoint, a directory of checkpoints, or a run directory; "
                f"found neither {MANIFEST} nor step-… nor job.json"
            )
    return Inspected(store, tuple(store.committed()), run if run.exists else _run_of(path), False)


def _require_no_replicas(path: Path) -> None:
    """Raises UsageError that names the runs whose copies `path` holds, if it is such a target."""
    found: dict[str, int] = {}
    for entry in sorted(path.iterdir()):
        with suppress(OSError):
            if entry.is_dir() and (count := len(Store(entry).committed())):
                found[entry.name] = count
    if found:
        runs = ", ".join(f"{run} ({plural(count, 'checkpoint')})" for run, count in found.items())
        raise UsageError(
            f"{path}: expected a checkpoint, a directory of checkpoints, or a run directory; found"
            f" runs with checkpoints, as a target of checkpoint.replicas has them: {runs}",
            hint=f"name one of them: autoglm ckpts {path / next(iter(found))}. {_BRING_BACK}",
        )


def find_all(given: Path) -> Inspected:
    """As `find`, but one checkpoint means all those beside it."""
    found = find(given)
    return find(found.store.root) if found.single else found


def expectation(run: RunDirectory | None) -> Expectation | None:
    """What the run expects of its checkpoints, None without a run."""
    if run is None:
        return None
    from autoglm_resume.supervise.core import history

    journal = run.events()
    world = next((e.world_size for e in journal if isinstance(e, RunStarted)), None)
    guards, checkpoint = run.section("guards"), run.section("checkpoint")
    size = guards.get("world_size", "strict")
    past = history.recall(journal)
    model = history.model_of(past.models, world or 0)
    return Expectation(
        world_size=world or 0,
        model_hash=model.hash if model else None,
        model=model.structure if model else None,
        check_world_size=bool(world) and size != "off",
        elastic=size == "elastic",
        check_model=guards.get("model", "strict") == "strict" and checkpoint.get("strict", True),
        rename=checkpoint.get("rename") or {},
        branches=past.branches,
    )


def inspect(
    target: Inspected, path: Path, expected: Expectation | None, progress: Progress | None = None
) -> Inspection:
    """One checkpoint; with `progress`, every byte of it is read and checked."""
    facts = examine(target.store, path, deep=progress is not None, progress=progress)
    parts = facts.parts if facts.integrity.ok else _parts(target.store, facts)
    return Inspection(facts, judged(facts, expected), parts, _chain(target.store, facts))


def verdicts(
    target: Inspected, expected: Expectation | None, progress: Progress | None = None
) -> list[Verdict]:
    """Of all checkpoints of `target`, newest first; with `progress`, every byte is read."""
    found = []
    for path in target.paths:
        facts = examine(target.store, path, deep=progress is not None, progress=progress)
        if facts.integrity.ok or path.exists():  # else the run has retired it in the meantime
            found.append(judged(facts, expected))
    return found


def stored_bytes(target: Inspected, paths: Iterable[Path]) -> int:
    """Bytes that a verification will read, as far as the manifests can be read."""
    total = 0
    for path in paths:
        try:
            total += target.store.load_manifest(path).stored
        except (CheckpointError, OSError):
            continue
    return total


def judged(facts: Candidate, expected: Expectation | None) -> Verdict:
    """What the gate would say; without a run only of what the checkpoint is in itself."""
    if expected is not None:
        return judge(facts, expected)
    verdict = judge(facts, Expectation(0, check_world_size=False, check_model=False))
    alone = "no run beside it to compare with"
    checks = (replace(c, detail=alone) if c.expected == "any" else c for c in verdict.checks)
    return replace(verdict, checks=tuple(checks))


def sound(verdict: Verdict) -> bool:
    """Whether nothing is wrong with it, though the run may have left it behind on a branch."""
    return all(check.ok or check.name == "branch" for check in verdict.checks)


def word(verdict: Verdict) -> str:
    """`ok`, `given up`, or `FAILED`."""
    return "ok" if verdict.accepted else "given up" if sound(verdict) else "FAILED"


def _run_of(root: Path) -> RunDirectory | None:
    """The run whose checkpoints are in `root`: one that `root` lies in, or that had it last."""
    if root.name == QUARANTINE:
        return _run_of(root.parent)
    for directory in (*root.resolve().parents, last_run(root)):
        run = RunDirectory(directory) if directory is not None else None
        with suppress(UsageError, OSError):  # a copy, or no job at all
            if run is not None and run.exists and same(home.checkpoints(run), root):
                return run
    return None


def _parts(store: Store, facts: Candidate) -> tuple[Part, ...]:
    found = []
    for rank in range(facts.world_size or 0):
        try:
            found.append(store.load_part(Path(facts.path), rank))
        except (CheckpointError, OSError):
            continue  # the verdict says so
    return tuple(found)


def _chain(store: Store, facts: Candidate) -> tuple[Link, ...]:
    links: list[Link] = []
    parent = facts.manifest.parent if facts.manifest else None
    seen = {facts.id}
    while parent is not None and parent.id not in seen:
        seen.add(parent.id)
        directory = store.directory(parent.id)
        if not (directory / MANIFEST).exists():
            links.append(Link(parent.id, parent.digest, "not here any more"))
            break
        try:
            manifest = store.load_manifest(directory)
        except (CheckpointError, OSError) as error:
            links.append(Link(parent.id, parent.digest, short(str(error))))
            break
        same = manifest.digest == parent.digest
        state = "here" if same else short(f"another one with this id: {manifest.digest}")
        links.append(Link(parent.id, parent.digest, state))
        if not same:
            break
        parent = manifest.parent
    return tuple(links)


# Shown


def checks_table(checks: Sequence[GateCheck]) -> Table:
    """Verdict of each check."""
    table = Table(("check", "verdict", "expected", "found"))
    for check in checks:
        found = short(check.found) + (f" ({short(check.detail)})" if check.detail else "")
        table.add(
            check.name,
            "ok" if check.ok else "FAILED",
            short(check.expected),
            found,
            style="" if check.ok else "red",
        )
    return table


def verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    """One line per checkpoint."""
    table = Table(("checkpoint", "step", "verdict", "why"), right=frozenset([1]))
    for verdict in verdicts:
        failed = [failed_check(CheckMade(**asdict(c))) for c in verdict.checks if not c.ok]
        passed = ", ".join(f"{c.name} {short(c.found)}" for c in verdict.checks if c.ok)
        table.add(
            verdict.id,
            verdict.step,
            word(verdict),
            "; ".join(failed) or passed,
            style="" if sound(verdict) else "red",
        )
    return table


def tables(found: Inspection, *, tensors: bool) -> list[Table]:
    """The manifest, its parts, objects, chain and checks; and all tensors if wanted."""
    shown = [_manifest_table(found.facts)]
    manifest = found.facts.manifest
    if manifest is not None:
        parts = Table(("part", "tensors", "raw", "stored", "digest"), right=frozenset((1, 2, 3)))
        counts = {part.rank: len(part.tensors) for part in found.parts}
        for ref in manifest.parts:
            count = counts.get(ref.rank, "?")
            parts.add(ref.file, count, size(ref.raw), size(ref.stored), short(ref.digest))
        objects = Table()
        for name, digest in manifest.objects.items():
            objects.add(f"digest of {name}", digest)
        shown += [parts, objects]
    if tensors:
        shown.append(_tensors_table(found.tensors))
    if found.chain:
        chain = Table(("parent", "manifest digest", "state"))
        for link in found.chain:
            chain.add(link.id, short(link.digest), link.state)
        shown.append(chain)
    return [*shown, checks_table(found.verdict.checks)]


def _manifest_table(facts: Candidate) -> Table:
    table = Table()
    table.add("checkpoint", facts.id)
    table.add("step", facts.step)
    table.add("directory", facts.path)
    manifest = facts.manifest
    if manifest is None:
        return table
    created = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(manifest.created))
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    present = {"random generators": manifest.rng, "data position": manifest.data}
    table.add("created", created)
    table.add("world size", manifest.world_size)
    table.add("model hash", manifest.model_hash or "none")
    table.add("versions", versions)
    table.add("size", f"{size(manifest.raw)}, stored as {size(manifest.stored)}")
    table.add("holds", ", ".join(f"{n}: {'yes' if v else 'no'}" for n, v in present.items()))
    table.add("parent", manifest.parent.id if manifest.parent else "none")
    table.add("digest", manifest.digest)
    return table


def _tensors_table(tensors: Iterable[tuple[int, Tensor]]) -> Table:
    table = Table(("rank", "tensor", "dtype", "shape", "size", "chunks"), frozenset((0, 4, 5)))
    for rank, tensor in tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        table.add(rank, tensor.name, tensor.dtype, shape, size(tensor.nbytes), len(tensor.chunks))
    return table


def to_json(found: Inspection, *, tensors: bool) -> dict[str, Any]:
    """Everything that the tables show."""
    facts = found.facts
    manifest = facts.manifest
    document: dict[str, Any] = {
        "id": facts.id,
        "step": facts.step,
        "path": facts.path,
        "ok": found.verdict.accepted,
        "checks": [asdict(check) for check in found.verdict.checks],
        "manifest": manifest.to_json() if manifest else None,
        "objects": manifest.objects if manifest else {},
        "chain": [asdict(link) for link in found.chain],
    }
    if tensors:
        document["tensors"] = [
            {
                "rank": rank,
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "chunks": len(tensor.chunks),
                "digest": tensor.digest,
            }
            for rank, tensor in found.tensors
        ]
    return document


def show(tables: Sequence[Table]) -> None:
    """On standard output, with a line between them."""
    for index, table in enumerate(tables):
        if index:
            output.show()
        table.print(sys.stdout)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 if all are good, 1 if some are, 90 if none is."""
    good = sum(map(sound, verdicts))
    if good == len(verdicts):
        return 0
    return 1 if good else CheckpointError.exit_code
