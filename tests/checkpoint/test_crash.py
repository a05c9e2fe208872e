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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_resume import files
from autoglm_resume.checkpoint.chunks import direct_io
from autoglm_resume.checkpoint.state import restore
from autoglm_resume.checkpoint.store.commit import abandoned, complete, sweep
from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import pack_writer
from tests.checkpoint.lossy import (
    Crashed,
    Op,
    Places,
    Tree,
    lost,
    record,
    torn,
    whole,
    zeroed,
)
from tests.checkpoint.stories import ID, RANKS, STORIES, Run, state_of


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
