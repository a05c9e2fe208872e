"""Whoever dies when: after every operation on files a checkpoint is there to continue from.

Two deaths are rehearsed with the real code on real files. A process dies between two operations,
and what it did stays. Or the machine loses its power, and with it whatever was not flushed (see
lossy.py), after every operation, in every combination that hypothesis thinks of.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossy import Crashed, Op, Places, Recorder, Tree, lost, record, torn, whole, zeroed

from autoglm_resume import files
from autoglm_resume.checkpoint import capture, mirror, repair, restore
from autoglm_resume.checkpoint.gate import Expectation, choose
from autoglm_resume.checkpoint.manifest import checkpoint_id
from autoglm_resume.checkpoint.options import Options
from autoglm_resume.checkpoint.previous import Previous
from autoglm_resume.checkpoint.retention import Keep
from autoglm_resume.checkpoint.saver import Saver
from autoglm_resume.checkpoint.snapshot import Snapshot
from autoglm_resume.checkpoint.storage import open_storage
from autoglm_resume.checkpoint.store import Store
from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.gatekeeper import Gatekeeper
from autoglm_resume.worker import housekeeping
from autoglm_resume.worker.contract import Checkpointing
from autoglm_resume.worker.events import Events

RANKS = 2
STEPS = range(1, 6)


@cache
def state_of(step: int, rank: int) -> dict[str, Any]:
    """Both ranks hold the same model, half of which never changes; a generator is their own."""
    slowly = torch.linspace(0, 1, 24 * 24).reshape(24, 24) * (1 + step / 1000)
    generator = torch.Generator().manual_seed(100 * step + rank)
    frozen = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    return {
        "model": {"frozen": frozen, "trained": slowly, "step": torch.tensor(step)},
        "rng": {"torch": generator.get_state()[:64].clone()},
    }


def snapshots(step: int, lineage: Sequence[int], token: str = "a0") -> list[Snapshot]:
    """Of all ranks; `lineage` are the steps it descends from, newest first."""
    return [
        capture.take(
            state_of(step, rank),
            id=checkpoint_id(step, token),
            rank=rank,
            world_size=RANKS,
            lineage=tuple(checkpoint_id(earlier, "a0") for earlier in lineage),
            model=capture.structure_of(state_of(step, rank)["model"]),
            rng=True,
            created=1_700_000_000.0 + step,
        )
        for rank in range(RANKS)
    ]


class Run:
    """The savers of a run whose store is in `root`, and what they do."""

    def __init__(self, root: Path, recorder: Recorder | None = None) -> None:
        self.root = root
        self.store = Store(root / "store")
        self.savers = [Saver(self.store, Options(compress="small")) for _ in range(RANKS)]
        self.recorder = recorder

    def mark(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.mark(text)

    def save(self, taken: Sequence[Snapshot]) -> None:
        """All ranks at once, as their savers do it."""
        failures: list[BaseException] = []

        def persist(rank: int) -> None:
            try:
                self.savers[rank].persist(taken[rank])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=persist, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self.mark(f"saved {taken[0].id}")

    def tidy(self, taken: Sequence[Snapshot], keep: int) -> None:
        """What follows a save, in every rank."""
        how = Checkpointing(dir=str(self.store.root), keep=Keep(last=keep))
        for snapshot in taken:
            housekeeping.tidy(self.store, how, snapshot, frozenset(), Events(None, snapshot.rank))

    def follow(self, id: str) -> None:
        """Go on from a checkpoint, as savers of a new attempt do."""
        path = self.store.directory(id)
        for rank, saver in enumerate(self.savers):
            saver.follow(Previous(self.store.load_part(path, rank)))

    def keeper(self) -> Gatekeeper:
        job = Job.model_validate(
            {
                "name": "run",
                "script": str(self.root / "train.py"),
                "workdir": str(self.root),
                "run_dir": str(self.root),
                "checkpoint": {"dir": str(self.store.root)},
            }
        )
        return Gatekeeper(job, RANKS, lambda event, **fields: None)

    def replicate(self, id: str) -> None:
        target = self.root / "replica"
        here = mirror.committed(self.store, {})
        mirror.replicate(self.store, id, here, {}, open_storage(str(target), "run"))
        self.mark(f"replicated {id}")


def lineage_of(step: int) -> list[int]:
    return list(range(step - 1, 0, -1))


TAKEN = {step: snapshots(step, lineage_of(step)) for step in STEPS}
AGAIN = snapshots(3, [2, 1], token="a1")
ID = {step: TAKEN[step][0].id for step in STEPS}


# Stories


def save_and_retire(run: Run) -> None:
    """Saves from nothing, deltas and references among them, one that a rank never finished."""
    for step in STEPS:
        if step == 3:
            Saver(run.store, share=False).persist(TAKEN[3][0])
        else:
            run.save(TAKEN[step])
            run.tidy(TAKEN[step], keep=2)
    run.store.sweep()


def quarantine_and_go_on(run: Run) -> None:
    """The gate puts away what a rank refused, and the next attempt saves that step again."""
    for step in (1, 2, 3):
        run.save(TAKEN[step])
    keeper = run.keeper()
    keeper.refused[ID[3]] = "a drill"
    point = keeper.pass_gate()
    assert point is not None
    assert point.id == ID[2]
    keeper.clean()
    run.follow(ID[2])
    run.save(AGAIN)
    run.tidy(AGAIN, keep=2)


def replicate_and_repair(run: Run) -> None:
    """Every checkpoint is copied; then files are lost here, and brought back."""
    (run.root / "replica").mkdir()
    files.sync_directory(run.root)
    for step in (1, 2):
        run.save(TAKEN[step])
        run.replicate(ID[step])
    storage = open_storage(str(run.root / "replica"), "run")
    run.mark(f"lost {ID[2]}")
    (run.store.directory(ID[2]) / "rank-00001.pack").unlink()
    repair.repair(run.store, ID[2], [storage])
    run.mark(f"saved {ID[2]}")
    for step in (2, 1):
        run.mark(f"lost {ID[step]}")
        run.store.delete(ID[step])
    repair.restore_missing(run.store, [str(run.root / "replica")])
    run.mark(f"saved {ID[2]}")


STORIES = {
    story.__name__.replace("_", " "): story
    for story in (save_and_retire, quarantine_and_go_on, replicate_and_repair)
}


@dataclass
class Recording:
    """A story's trace, and what was found out about trees that crashes in it leave."""

    name: str
    ops: list[Op]
    places: Places
    points: int = 0
    known: dict[Any, str] = field(default_factory=dict)

    def problem(self, crashed: Crashed, tree: Tree) -> str:
        """Why the tree is not what it has to be; nothing if it is."""
        self.points += 1
        safe, copied = self.promised(crashed)
        key = (frozenset(tree.items()), safe, copied)
        if key not in self.known:
            place = self.places.make(tree)
            try:
                self.known[key] = reopened(Store(place / "store"), safe) or trusted(
                    Store(place / "replica" / "run"), copied
                )
            finally:
                shutil.rmtree(place)
        return self.known[key]

    def promised(self, crashed: Crashed) -> tuple[frozenset[str], frozenset[str]]:
        """Ids that were saved, and not put away since; ids that were replicated."""
        safe: set[str] = set()
        copied: set[str] = set()
        for mark in crashed.marks:
            what, _, id = mark.partition(" ")
            if what == "saved":
                safe.add(id)
            elif what == "lost":
                safe.discard(id)
            elif what == "replicated":
                copied.add(id)
        gone = {path.removeprefix("store/") for path in crashed.moved}
        return frozenset(safe - (gone - self.back(crashed))), frozenset(copied)

    @staticmethod
    def back(crashed: Crashed) -> set[str]:
        return {m.removeprefix("saved ") for m in crashed.marks[-2:] if m.startswith("saved ")}


def trusted(store: Store, promised: frozenset[str]) -> str:
    """A checkpoint that has a manifest is whole, and what was promised is there."""
    there = set()
    for facts in store.candidates(deep=True):
        if not facts.integrity.ok:
            return f"{facts.id} has a manifest: {facts.integrity.problem}"
        there.add(facts.id)
    return f"expected {sorted(promised)}, found {sorted(there)}" if promised - there else ""


def reopened(store: Store, promised: frozenset[str]) -> str:
    """What a supervisor does after the crash has to find everything that was promised."""
    before = choose(store.candidates(deep=True), Expectation(RANKS)).accepted
    store.complete()
    if problem := trusted(store, promised):
        return problem
    accepted = choose(store.candidates(), Expectation(RANKS)).accepted
    store.sweep()
    if choose(store.candidates(), Expectation(RANKS)).accepted != accepted:
        return "the sweep changed what is accepted"
    if accepted is None:
        return "" if before is None else f"{before.id} was there"
    if before is not None and accepted.step < before.step:
        return f"{before.id} was there, and then {accepted.id} was newer"
    for rank in range(RANKS):
        states = restore.read(store, store.directory(accepted.id), rank).states
        if not equal(states, state_of(accepted.step, rank)):
            return f"{accepted.id}: rank {rank} loaded something else"
    return ""


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory, where flushing costs nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as root:
        yield Path(root)


@pytest.fixture(scope="module")
def recordings(memory: Path) -> dict[str, Recording]:
    def one(name: str, story: Callable[[Run], None]) -> Recording:
        root = memory / name.replace(" ", "-")
        places = memory / f"{root.name}-places"
        root.mkdir()
        places.mkdir()
        ops = record(root, lambda recorder: story(Run(root, recorder)))
        return Recording(name, ops, Places(places))

    return {name: one(name, story) for name, story in STORIES.items()}


def extremes(crashed: Crashed) -> Iterator[Tree]:
    """Everything that was not flushed is there, or nothing, or all but one, or one alone; what was
    flushed and what was done before it; and files in every state."""
    pending = crashed.pending
    kept: list[Sequence[int]] = [pending[:n] for n in range(len(pending) + 1)]
    kept += [[one] for one in pending]
    kept += [[other for other in pending if other != one] for one in pending]
    for survivors in {tuple(each) for each in kept}:
        for fate in (lost, whole, torn(crashed.at * 37), zeroed(0)):
            fates = dict.fromkeys(crashed.unflushed(survivors), fate)
            yield crashed.tree(survivors, fates)


@pytest.mark.parametrize("story", STORIES)
def test_losing_power_after_any_operation_leaves_the_last_committed_checkpoint(
    recordings: dict[str, Recording], story: str
) -> None:
    recording = recordings[story]
    for at in range(len(recording.ops) + 1):
        crashed = Crashed.before(recording.ops, at, {})
        for tree in extremes(crashed):
            problem = recording.problem(crashed, tree)
            assert problem == "", f"before operation {at}, {recording.ops[at : at + 1]}"
    assert recording.points > 1000
    assert len(recording.known) > 50
