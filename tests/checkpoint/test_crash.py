"""Whoever dies when: after every operation on files a checkpoint is there to continue from.

Two deaths are rehearsed with the real code on real files. A process dies between two operations,
and what it did stays. Or the machine loses its power, and with it whatever was not flushed (see
lossy.py), after every operation, in every combination that hypothesis thinks of.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import direct_io
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.replicas import mirror, repair
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.storage.storage import open_storage
from autoglm_resume.checkpoint.store.commit import abandoned, complete, sweep
from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import pack_writer
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.savers import housekeeping
from autoglm_resume.supervise.core.history import History
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.worker.event_log import EventLog
from tests.checkpoint.lossy import (
    Crashed,
    Op,
    Places,
    Recorder,
    Tree,
    lost,
    record,
    torn,
    whole,
    zeroed,
)

RANKS = 2
STEPS = range(1, 6)


@cache
def state_of(step: int, rank: int) -> dict[str, Any]:
    """Both ranks hold the same model, half of which hardly changes; a generator is their own."""
    slowly = torch.linspace(0, 1, 24 * 24).reshape(24, 24) * (1 + step / 1000)
    generator = torch.Generator().manual_seed(100 * step + rank)
    frozen = torch.randn(24, 24, generator=torch.Generator().manual_seed(step // 3))
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
        self.savers = [
            PartWriter(self.store, SaveOptions("small", keyframe_every=1)) for _ in range(RANKS)
        ]
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
        how = Checkpointing(dir=str(self.store.root), keep=KeepRules(last=keep))
        for snapshot in taken:
            tell = EventLog(None, snapshot.rank).emit
            housekeeping.tidy(self.store, how, snapshot, frozenset(), tell)

    def follow(self, id: str) -> None:
        """Go on from a checkpoint, as savers of a new attempt do."""
        path = self.store.directory(id)
        for rank, saver in enumerate(self.savers):
            saver.follow(PreviousPart(self.store.load_part(path, rank)))

    def gate(self) -> RunGate:
        job = Job.model_validate(
            {
                "name": "run",
                "script": str(self.root / "train.py"),
                "workdir": str(self.root),
                "run_dir": str(self.root),
                "checkpoint": {"dir": str(self.store.root)},
            }
        )
        return RunGate(job, RANKS, lambda event, **fields: None, History())

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
            PartWriter(run.store, share=False).persist(TAKEN[3][0])
        else:
            run.save(TAKEN[step])
            run.tidy(TAKEN[step], keep=2)
    sweep(run.store)


def quarantine_and_go_on(run: Run) -> None:
    """The gate puts away what a rank refused, and the next attempt saves that step again."""
    for step in (1, 2, 3):
        run.save(TAKEN[step])
    gate = run.gate()
    gate.refuse(ID[3], "a drill")
    point = gate.pass_gate()
    assert point is not None
    assert point.id == ID[2]
    gate.clean()
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
    run.mark(f"damaged {ID[2]}")
    (run.store.directory(ID[2]) / "rank-00001.pack").unlink()
    repair.repair(run.store, ID[2], [storage])
    run.mark(f"saved {ID[2]}")
    for step in (2, 1):
        run.mark(f"damaged {ID[step]}")
        run.store.delete(ID[step])
    repair.restore_missing(run.store, [str(run.root / "replica")])
    run.mark(f"saved {ID[2]}")


def recover_from_a_crash(run: Run) -> None:
    """The gate finishes what was left half done by a crash before the last commit."""
    gate = run.gate()
    point = gate.pass_gate()
    assert point is not None
    run.mark(f"saved {point.id}")
    gate.clean()


STORIES = {
    story.__name__.replace("_", " "): story
    for story in (
        save_and_retire,
        recover_from_a_crash,
        quarantine_and_go_on,
        replicate_and_repair,
    )
}


@dataclass
class Recording:
    """A story's trace, and what was found out about trees that crashes in it leave.

    `start` is what was on the disk before, with the checkpoints `saved`.
    """

    ops: list[Op]
    places: Places
    start: Tree
    saved: frozenset[str]
    points: int = 0
    known: dict[Any, str] = field(default_factory=dict)

    def before(self, at: int) -> Crashed:
        return Crashed.before(self.ops, at, self.start)

    def problem(self, crashed: Crashed, tree: Tree) -> str:
        """Why the tree is not what it has to be; nothing if it is."""
        self.points += 1
        promised = Promised.of(crashed, self.saved)
        key = (frozenset(tree.items()), promised)
        if key not in self.known:
            place = self.places.make(tree)
            try:
                self.known[key] = self._reopened(place, promised)
            finally:
                shutil.rmtree(place)
        return self.known[key]

    def _reopened(self, place: Path, promised: Promised) -> str:
        """What a supervisor does after the crash has to find everything that was promised."""
        store, replica = Store(place / "store"), Store(place / "replica" / "run")
        before = {path.name for path in store.committed()} - promised.damaged
        complete(store)
        content = committed(store)
        sweep(store)
        if committed(store) != content:
            return "the sweep removed something good"
        if store.uncommitted() or abandoned(store):
            return f"the sweep left {store.uncommitted() or abandoned(store)}"
        return self._trusted(
            store, replace(promised, saved=promised.saved | before)
        ) or self._trusted(replica, Promised(promised.copied))

    def _trusted(self, store: Store, promised: Promised) -> str:
        """`trusted`, which depends on nothing but these."""
        key = (committed(store), promised, store.root.name)
        if key not in self.known:
            self.known[key] = trusted(store, promised)
        return self.known[key]


def committed(store: Store) -> frozenset[tuple[str, bytes]]:
    """All files of the committed checkpoints."""
    return frozenset(
        (f"{path.name}/{file.name}", file.read_bytes())
        for path in store.committed()
        for file in path.iterdir()
        if not file.name.startswith(files.TEMPORARY)
    )


@dataclass(frozen=True)
class Promised:
    """Ids that were saved, and not put away since; that are damaged here; that were replicated."""

    saved: frozenset[str]
    damaged: frozenset[str] = frozenset()
    copied: frozenset[str] = frozenset()

    @classmethod
    def of(cls, crashed: Crashed, already: frozenset[str]) -> Promised:
        saved, damaged, copied = set(already), set[str](), set[str]()
        for mark in crashed.marks:
            what, _, id = mark.partition(" ")
            if what == "saved":
                saved.add(id)
                damaged.discard(id)
            elif what == "replicated":
                copied.add(id)
            elif what == "damaged":
                damaged.add(id)
                saved.discard(id)
            else:
                saved.discard(id.removeprefix("store/"))
        return cls(frozenset(saved), frozenset(damaged), frozenset(copied))


def trusted(store: Store, promised: Promised) -> str:
    """A checkpoint that has a manifest is whole, what was promised is there, the newest loads."""
    good = []
    for facts in candidates(store, deep=True):
        if facts.integrity.ok:
            good.append(facts)
        elif facts.id not in promised.damaged:
            return f"{facts.id} has a manifest: {facts.integrity.problem}"
    missing = promised.saved - {facts.id for facts in good}
    if missing:
        return f"expected {sorted(missing)}, found {[facts.id for facts in good]}"
    for facts in good[:1]:
        for rank in range(RANKS):
            states = restore.read(store, Path(facts.path), rank).states
            if not equal(states, state_of(facts.step, rank)):
                return f"{facts.id}: rank {rank} loaded something else"
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


class Recordings:
    """Made when they are asked for."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._made: dict[str, Recording] = {}

    def __getitem__(self, name: str) -> Recording:
        if name not in self._made:
            places = Places(Path(tempfile.mkdtemp(dir=self._memory)))
            start, saved = self._start(name)
            root = places.make(start)
            with pytest.MonkeyPatch.context() as patch:
                # So small that even these packs take several.
                patch.setattr(direct_io, "BUFFER_BYTES", direct_io.BLOCK)
                patch.setattr(pack_writer, "WINDOW_BYTES", direct_io.BLOCK)
                ops = record(root, lambda recorder: STORIES[name](Run(root, recorder)))
            self._made[name] = Recording(ops, places, start, saved)
        return self._made[name]

    def _start(self, name: str) -> tuple[Tree, frozenset[str]]:
        """Where one story begins in the middle of another, it begins after a crash there."""
        if name != "recover from a crash":
            return {}, frozenset()
        earlier = self["save and retire"]
        links = [index for index, op in enumerate(earlier.ops) if op.kind == "link"]
        crashed = earlier.before(links[-1])
        saved = Promised.of(crashed, frozenset()).saved
        return crashed.tree(crashed.pending, {}), saved


@pytest.fixture(scope="module")
def recordings(memory: Path) -> Recordings:
    return Recordings(memory)


def extremes(crashed: Crashed) -> Iterator[Tree]:
    """Of what was not flushed everything is there, as after the death of a process, or nothing, or
    what was done up to some moment, and files in every state; or all but one change, or one alone.
    """
    pending = crashed.pending
    for count in range(len(pending) + 1):
        survivors = frozenset(pending[:count])
        uncertain = crashed.unflushed(survivors)
        for fate in (whole, lost, torn(crashed.at * 37), zeroed(0))[: 4 if uncertain else 1]:
            yield crashed.tree(survivors, dict.fromkeys(uncertain, fate))
    for one in pending:
        for survivors in (frozenset({one}), frozenset(pending) - {one}):
            yield crashed.tree(survivors, dict.fromkeys(crashed.unflushed(survivors), whole))


@pytest.mark.parametrize("story", STORIES)
def test_dying_after_any_operation_leaves_the_last_committed_checkpoint(
    recordings: Recordings, story: str
) -> None:
    recording = recordings[story]
    for at in range(len(recording.ops) + 1):
        crashed = recording.before(at)
        for tree in extremes(crashed):
            problem = recording.problem(crashed, tree)
            assert problem == "", f"before operation {at}, {recording.ops[at : at + 1]}"


FATES = st.one_of(
    st.sampled_from([lost, whole]),
    st.integers(0, 1 << 16).map(torn),
    st.integers(0, 1 << 16).map(zeroed),
)


@pytest.mark.parametrize("story", STORIES)
@given(data=st.data())
@settings(max_examples=400)
def test_whatever_of_it_was_flushed(
    recordings: Recordings, story: str, data: st.DataObject
) -> None:
    recording = recordings[story]
    crashed = recording.before(data.draw(st.integers(0, len(recording.ops)), label="operation"))
    survivors = data.draw(st.sets(st.sampled_from(crashed.pending or [-1])), label="survivors")
    uncertain = sorted(crashed.unflushed(survivors))
    fates = {path: data.draw(FATES, label=path) for path in uncertain}
    assert recording.problem(crashed, crashed.tree(survivors, fates)) == ""


def without(ops: list[Op], flushed: Callable[[str], bool]) -> list[Op]:
    """The trace of code that flushes everything but this."""
    tokens = {op.token for op in ops if op.kind == "flush" and flushed(op.path)}
    return [op for op in ops if not op.kind.startswith("flush") or op.token not in tokens]


@pytest.mark.parametrize(
    "what",
    [r"\.pack", r"rank-\d+\.json", r"manifest\.json", r"a0", r"store"],
    ids=lambda what: what.replace("\\", ""),
)
def test_code_that_forgets_to_flush_would_be_found_out(recordings: Recordings, what: str) -> None:
    recording = recordings["save and retire"]
    ops = without(recording.ops, lambda path: re.search(what + "$", path) is not None)
    assert len(ops) < len(recording.ops)
    careless = replace(recording, ops=ops, points=0, known={})
    trees = ((c, tree) for c in map(careless.before, range(len(ops) + 1)) for tree in extremes(c))
    assert any(careless.problem(crashed, tree) for crashed, tree in trees)


def test_the_stories_tell_of_everything_and_have_thousands_of_points(
    recordings: Recordings,
) -> None:
    made = [recordings[story] for story in STORIES]
    moved = {op.path for recording in made for op in recording.ops if op.kind == "rename"}
    assert moved >= {f"store/{ID[step]}" for step in (1, 2, 3)}, "retired, and put away"
    sizes = Counter(op.path for op in made[0].ops if op.kind == "write" and ".pack" in op.path)
    assert max(sizes.values()) > 1, "a pack grows"
    assert sum(len(recording.ops) for recording in made) > 800
    assert sum(recording.points for recording in made) > 5000
