"""What a part takes from the one before it, over long series of made-up parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autoglm_resume.checkpoint.format.document import digest, digest_of_digests
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import Fingerprint, Pack, Tensor, object_digest
from autoglm_resume.checkpoint.write.reuse import ChunkTable, PreviousPart, Sharing

State = dict[str, bytes]
Stored = Callable[[str, bytes], int]


@dataclass
class Series:
    """Saves states one after the other, as a packer does; a tensor is one small chunk."""

    limit: int
    peers: frozenset[bytes] = frozenset()
    parts: list[Part] = field(default_factory=list)
    written: dict[tuple[str, int], str] = field(default_factory=dict)
    """Digest of what lies where in which pack."""
    previous: PreviousPart | None = None

    def save(
        self, state: State, *, delta: bool = True, stored: Stored = lambda name, raw: 10
    ) -> Part:
        id = checkpoint_id(len(self.parts) + 1, "a0")
        sharing = Sharing(self.previous, self.limit, {digest(raw) for raw in state.values()})
        table = ChunkTable(id, self.previous)
        rows = {
            name: self._row(sharing, table, name, raw, delta, stored) for name, raw in state.items()
        }
        packs, chunks = table.finish(Pack(id, Fingerprint(table.end, 1, 2, 3)))
        tensors = tuple(
            Tensor(
                f"model/{name}",
                "uint8",
                (len(raw),),
                digest_of_digests([digest(raw)]),
                (rows[name],),
            )
            for name, raw in state.items()
        )
        tree = {name: {"$tensor": f"model/{name}"} for name in state}
        part = Part(
            id=id,
            step=len(self.parts) + 1,
            rank=0,
            world_size=1,
            lineage=(),
            created=1.0,
            versions={},
            model=None,
            objects={"model": object_digest(tree, tensors)},
            state={"model": tree},
            tensors=tensors,
            chunks=chunks,
            packs=packs,
            rng=False,
            data=False,
        )
        for chunk in chunks:
            if chunk.pack == 0:
                self.written[id, chunk.offset] = chunk.digest
        self.parts.append(part)
        memory = {f"model/{name}": memoryview(raw) for name, raw in state.items()}
        self.previous = PreviousPart(part, memory)
        return part

    def _row(
        self,
        sharing: Sharing,
        table: ChunkTable,
        name: str,
        raw: bytes,
        delta: bool,
        stored: Stored,
    ) -> int:
        found, same = table.find(digest(raw)), sharing.identical(digest(raw))
        if found is not None:
            return found
        if same is not None:
            return table.take(same)
        if raw in self.peers:
            return table.peers(digest(raw), len(raw))
        base = sharing.base(f"model/{name}", 0, len(raw)) if delta else None
        if base is not None:
            assert self.previous is not None
            assert bytes(base[1]) == bytes(self.previous.tensors[f"model/{name}"])
        row = base[0] if base else None
        codec = "delta" if base else "raw"
        return table.own(digest(raw), len(raw), stored(name, raw), codec, row)[0]

    def check(self, part: Part) -> None:
        """Every reference leads to the bytes it should, through no more packs than allowed."""
        assert Part.decode(part.encode(), "part") == part  # which has no cycles
        assert len(part.needs) <= self.limit
        for chunk in part.chunks:
            if chunk.pack is not None:
                assert self.written[part.packs[chunk.pack].id, chunk.offset] == chunk.digest
        used = {part.packs[chunk.pack].id for chunk in part.chunks if chunk.pack is not None}
        assert used | {part.id} == {pack.id for pack in part.packs}, "no pack is kept for nothing"


def states(number: int) -> State:
    """Everything changes at every step."""
    return {name: f"{name}{number:03}".encode() for name in ("a", "b", "c")}


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_a_part_needs_at_most_so_many_others_and_then_comes_a_keyframe(limit: int) -> None:
    series = Series(limit)
    needs = []
    for number in range(4 * limit + 4):
        part = series.save(states(number))
        series.check(part)
        needs.append(len(part.needs))
    assert needs == [*range(limit + 1)] * 4


def test_what_never_changes_is_written_once_and_taken_from_where_it_is() -> None:
    series = Series(4)
    parts = [series.save({"frozen": b"frozen" * 9}) for _ in range(30)]
    assert [part.needs for part in parts[1:]] == [(parts[0].id,)] * 29
    assert [part.stored for part in parts] == [10] + [0] * 29


def test_what_a_keyframe_takes_is_no_delta_and_from_few_packs() -> None:
    series = Series(2)
    for number in range(3):
        series.save({**states(number), "frozen": b"frozen" * 9})
    keyframe = series.save({**states(2), "frozen": b"frozen" * 9})
    series.check(keyframe)
    assert keyframe.needs == (series.parts[0].id,)
    assert [chunk.base for chunk in keyframe.chunks] == [None] * 4
    assert keyframe.stored == 30, "what was a delta is written anew"


@pytest.mark.parametrize(("bytes_", "taken"), [(8, False), (10, True), (50, True)])
def test_a_pack_of_which_less_than_a_tenth_is_the_same_is_not_kept_for_that(
    bytes_: int, taken: bool
) -> None:
    series = Series(4)
    sizes = {"same": bytes_, "rest": 100 - bytes_}
    series.save({"same": b"same", "rest": b"1"}, stored=lambda name, raw: sizes[name])
    part = series.save({"same": b"same", "rest": b"2"}, delta=False)
    assert (part.needs != ()) == taken


def test_a_delta_is_only_against_the_same_place_as_it_was_stored() -> None:
    series = Series(8)
    series.save({"a": b"11", "b": b"22"})
    part = series.save({"a": b"12", "b": b"33", "c": b"44", "longer": b"555"})
    by_name = {tensor.name: part.chunks[tensor.chunks[0]] for tensor in part.tensors}
    bases = {n: c.base is not None and part.chunks[c.base].digest for n, c in by_name.items()}
    assert bases == {
        "model/a": digest(b"11"),
        "model/b": digest(b"22"),
        "model/c": False,
        "model/longer": False,
    }
    assert Sharing(series.previous, 8, set()).base("model/a", 0, 1) is None, "another size"
    assert Sharing(series.previous, 8, set()).base("model/a", 1, 2) is None, "another place"


def test_memory_that_was_overwritten_is_no_base() -> None:
    series = Series(8)
    part = series.save({"a": b"11"})
    series.previous = PreviousPart(part, {"model/a": memoryview(b"xx")})
    assert series.save({"a": b"12"}).needs == ()
    series.previous = PreviousPart(part)
    assert series.save({"a": b"13"}).needs == ()


def test_without_a_part_before_everything_is_written() -> None:
    sharing = Sharing(None, 8, {digest(b"x")})
    assert sharing.keyframe
    assert sharing.identical(digest(b"x")) is None
    assert sharing.base("model/x", 0, 1) is None


def test_what_a_peer_stores_is_neither_taken_nor_a_base() -> None:
    series = Series(8, peers=frozenset([b"theirs"]))
    series.save({"a": b"theirs", "b": b"mine"})
    series.peers = frozenset()
    part = series.save({"a": b"thairs", "b": b"theirs"})
    series.check(part)
    assert [chunk.base is None for chunk in part.chunks[:1]] == [True]


def test_a_base_may_be_equal_to_what_is_written_anew() -> None:
    """A copy that follows one save behind, in a pack of which too little is the same."""
    series = Series(8)
    sizes = {"w": 1, "rest": 99, "copy": 1}
    series.save({"copy": b"0", "w": b"1", "rest": b"x"}, stored=lambda name, raw: sizes[name])
    series.check(series.save({"copy": b"1", "w": b"2", "rest": b"y"}))


def test_a_base_may_be_equal_to_what_a_peer_stores() -> None:
    series = Series(8)
    series.save(
        {"copy": b"0", "w": b"1", "rest": b"x"}, stored=lambda n, _: 99 if n == "rest" else 1
    )
    series.peers = frozenset([b"1"])
    series.check(series.save({"copy": b"1", "w": b"2", "rest": b"y"}))


def any_series(draw: random.Random, steps: int) -> Iterator[tuple[State, frozenset[bytes], bool]]:
    """Tensors that stay, change, or become what another one was; what peers have; deltas or not."""
    names = ("large", *"abcd")
    state = {name: b"%d" % number for number, name in enumerate(names)}
    for step in range(steps):
        before = dict(state)
        for name in names:
            match draw.randrange(4):
                case 0:
                    state[name] = b"%d" % draw.randrange(10)
                case 1:
                    state[name] = before[draw.choice(names)]
                case 2 if name == "large":
                    state[name] = b"%d" % (step + 10)
        present = draw.sample(names, draw.randint(1, len(names)))
        peers = frozenset(raw for raw in state.values() if draw.random() < 0.1)
        yield {name: state[name] for name in present}, peers, draw.random() < 0.9


@given(st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=150)
def test_any_series_stays_within_its_bounds_and_refers_to_what_is_there(
    limit: int, seed: int
) -> None:
    series = Series(limit)
    for state, series.peers, delta in any_series(random.Random(seed), 25):
        part = series.save(state, delta=delta, stored=lambda name, _: 90 if name == "large" else 3)
        series.check(part)
        bases = [chunk.base for chunk in part.chunks if chunk.base is not None]
        assert all(part.chunks[base].pack for base in bases)
