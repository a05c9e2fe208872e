"""What float32 determines is stored once in whole checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.chunks.reader import ChunkReader
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.snapshot import Snapshot
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.interop.adopt import adopt
from autoglm_resume.checkpoint.interop.gather import gather
from autoglm_resume.checkpoint.state import capture, reshard, restore, tree
from autoglm_resume.checkpoint.store.examine import examine
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter, Saved
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.errors import CorruptCheckpoint
from tests.checkpoint.half import ELEMENTS, HALF, both, random


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt")


class Mixed:
    """AdamW over float32 masters of a model in half precision, as libraries for it have one."""

    def __init__(self, dtype: torch.dtype, width: int = 900) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 3)
        ).to(dtype)
        self.masters = [p.detach().float().requires_grad_() for p in self.model.parameters()]
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-3)
        self.inputs = torch.randn(2, width).to(dtype)

    def step(self) -> None:
        self.model(self.inputs).float().square().mean().backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.adamw.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)

    def state(self) -> dict[str, Any]:
        masters = [master.detach() for master in self.masters]
        optimizer = {"adamw": self.adamw.state_dict(), "masters": masters}
        return {"model": self.model.state_dict(), "optimizer": optimizer}


def taken(step: int, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> Snapshot:
    return capture.take(state, id=checkpoint_id(step, "a0"), rank=rank, world_size=ranks)


def bytes_in(states: Any) -> list[bytes]:
    found: list[bytes] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(bytes(tree.as_bytes(value.detach().contiguous())))
        elif isinstance(value, dict):
            for member in value.values():
                walk(member)
        elif isinstance(value, list):
            for member in value:
                walk(member)

    walk(states)
    return found


def assert_holds(store: Store, part: Part, expected: dict[str, Any]) -> None:
    path = store.directory(part.id)
    assert bytes_in(restore.read(store, path, part.rank).states) == bytes_in(expected)
    facts = examine(store, path, deep=True)
    assert facts.integrity.ok, facts.integrity.problem


def casts_of(part: Part) -> dict[str, list[int]]:
    """By tensor: the places of its chunks that are casts."""
    found = {
        tensor.name: [n for n, index in enumerate(tensor.chunks) if part.chunks[index].cast_of]
        for tensor in part.tensors
    }
    return {name: places for name, places in found.items() if places}


@both
@pytest.mark.parametrize("compress", ["off", "fast", "small"])
def test_a_model_of_half_precision_costs_nothing_beside_its_masters(
    store: Store, dtype: str, compress: Any
) -> None:
    training, one = Mixed(HALF[dtype]), PartWriter(store, SaveOptions(compress))
    without = PartWriter(Store(store.root.parent / "without"), SaveOptions(compress))
    for step in range(1, 4):
        training.step()
        state = training.state()
        part = one.persist(taken(step, state)).part
        only = without.persist(taken(step, {"optimizer": state["optimizer"]})).part
        assert part.stored == only.stored
        assert set(casts_of(part)) == {f"model/{name}" for name in state["model"]}
        assert_holds(store, part, state)


def test_only_the_chunks_that_differ_are_stored(store: Store) -> None:
    master = random(3 * ELEMENTS + 10)
    almost = master.bfloat16()
    almost.view(torch.int16)[ELEMENTS + 77] ^= 1
    state = {"m": {"master": master, "exact": master.bfloat16(), "almost": almost}}
    part = PartWriter(store, SaveOptions("off")).persist(taken(1, state)).part
    assert casts_of(part) == {"m/exact": [0, 1, 2, 3], "m/almost": [0, 2, 3]}
    assert part.stored == 4 * master.numel() + CHUNK_BYTES
    assert_holds(store, part, state)


@both
def test_every_bit_of_any_nan_comes_back(store: Store, dtype: str) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    halves = patterns.to(torch.int16).view(HALF[dtype])
    masters = halves.float()
    noisy = ((patterns << 16) | 0x2345).view(torch.float32)
    state = {
        "m": {
            **{"halves": halves, "masters": masters, "back": masters.to(HALF[dtype])},
            **{"noisy": noisy, "cast": noisy.to(HALF[dtype])},
            **{"finite": random(1000), "half": random(1000).to(HALF[dtype])},
        }
    }
    part = PartWriter(store).persist(taken(1, state)).part
    assert "m/half" in casts_of(part)
    assert_holds(store, part, state)


def test_zeros_are_no_cast_of_themselves(store: Store) -> None:
    """A chunk of zeros is the cast of two that are the same as itself."""
    zeros = torch.zeros(2 * ELEMENTS)
    state = {"m": {"half": zeros.half(), "master": zeros, "moment": zeros, "more": zeros.half()}}
    for ranks in (1, 2):
        parts = all_ranks(store, ranks, [state] * ranks)
        assert [casts_of(part) for part in parts] == [{}] * ranks
        for part in parts:
            assert_holds(store, part, state)


def test_zeros_among_the_candidates_do_not_hide_the_master(store: Store) -> None:
    """Where most of a weight is zero, as of one that was pruned, moments have the same sample."""
    master = torch.zeros(1000)
    master[7] = 1.5
    state = {"m": {"half": master.half(), "moments": [torch.zeros(1000)] * 2, "master": master}}
    assert casts_of(PartWriter(store).persist(taken(1, state)).part) == {"m/half": [0]}


def test_a_damaged_master_is_noticed_whichever_of_the_two_is_read(store: Store) -> None:
    part = PartWriter(store).persist(taken(1, Mixed(torch.bfloat16).state())).part
    path = store.directory(part.id)
    pack = path / part.pack
    content = bytearray(pack.read_bytes())
    chunks = {
        tensor.name: part.chunks[tensor.chunks[0]] for tensor in part.tensors if tensor.chunks
    }
    content[chunks["optimizer/masters.0"].offset + 1000] ^= 4
    pack.write_bytes(content)
    with ChunkReader(path, [part]) as reader:
        for name in ("optimizer/masters.0", "model/0.weight"):
            target = memoryview(bytearray(chunks[name].raw))
            with pytest.raises(CorruptCheckpoint, match=rf"^{pack}: {name}: "):
                reader.read(part, chunks[name], target, name)
    with pytest.raises(CorruptCheckpoint, match=rf"^{pack}: "):
        restore.read(store, path, 0)
    facts = examine(store, path, deep=True)
    assert facts.integrity.problem.startswith(f"{pack}: ")


def test_a_cast_that_is_not_what_was_saved_is_noticed(store: Store) -> None:
    """As where the part names the wrong master: its own digest is what tells."""
    a, b = random(1000), random(1000, 1)
    state = {"m": {"a": a, "b": b, "half": a.bfloat16()}}
    part = PartWriter(store).persist(taken(1, state)).part
    rows = {tensor.name: tensor.chunks[0] for tensor in part.tensors}
    assert part.chunks[rows["m/half"]].cast_of == (rows["m/a"],)
    file = store.directory(part.id) / "rank-00000.json"
    wrong = file.read_text().replace(f"[{rows['m/a']}]]", f"[{rows['m/b']}]]")
    forged = Part.decode(wrong.encode(), str(file))
    with ChunkReader(file.parent, [forged]) as reader, pytest.raises(CorruptCheckpoint) as caught:
        reader.read(forged, forged.chunks[rows["m/half"]], memoryview(bytearray(2000)), "m/half")
    assert caught.value.message.startswith(f"{file}: m/half: expected blake3:")


@pytest.mark.parametrize("compress", ["fast", "small"])
def test_frozen_masters_are_shared_and_their_copies_still_cost_nothing(
    store: Store, compress: Any
) -> None:
    frozen, one = random(ELEMENTS + 5), PartWriter(store, SaveOptions(compress))
    parts = []
    for step in range(1, 4):
        state = {"m": {"half": frozen.bfloat16(), "master": frozen, "new": random(1000, step)}}
        parts.append(one.persist(taken(step, state)).part)
        assert casts_of(parts[-1]) == {"m/half": [0, 1]}
        assert_holds(store, parts[-1], state)
    assert [part.needs for part in parts[1:]] == [(parts[0].id,)] * 2
    assert parts[2].stored < 10_000
    # And by a saver that knows the one before only from its part.
    after = PartWriter(store, SaveOptions(compress))
    after.follow(PreviousPart(store.load_part(store.directory(parts[2].id), 0)))
    part = after.persist(taken(4, state)).part
    assert (casts_of(part), part.stored) == ({"m/half": [0, 1]}, 0)
    assert_holds(store, part, state)


def test_a_copy_whose_master_goes_is_stored_and_no_longer_when_it_is_back(store: Store) -> None:
    weight, one = random(ELEMENTS + 5), PartWriter(store, SaveOptions("small"))
    half = weight.bfloat16()
    for step, (state, expected) in enumerate(
        [
            ({"half": half, "master": weight}, {"m/half": [0, 1]}),
            ({"half": half}, {}),
            ({"half": half, "master": weight}, {"m/half": [0, 1]}),
            ({"half": half * 2, "master": weight}, {}),
            ({"half": half * 2, "master": weight * 2}, {"m/half": [0, 1]}),
        ],
        1,
    ):
        part = one.persist(taken(step, {"m": state})).part
        assert casts_of(part) == expected
        assert_holds(store, part, {"m": state})


# Several ranks


def all_ranks(store: Store, step: int, states: list[dict[str, Any]]) -> list[Part]:
    def persist(rank: int) -> Saved:
        return PartWriter(store).persist(taken(step, states[rank], rank, len(states)))

    with ThreadPoolExecutor(len(states)) as pool:
        return [saved.part for saved in pool.map(persist, range(len(states)))]


def test_ranks_that_hold_all_alike_cast_what_any_of_them_stores(store: Store) -> None:
    master = random(20 * ELEMENTS)
    state = {"m": {"half": master.bfloat16(), "master": master}}
    parts = all_ranks(store, 1, [state] * 3)
    assert [casts_of(part) for part in parts] == [{"m/half": list(range(20))}] * 3
    assert sum(part.stored for part in parts) < 4 * master.numel()
    sources = {part.chunks[s].with_peer for part in parts for c in part.chunks for s in c.cast_of}
    assert sources == {True, False}
    for part in parts:
        assert_holds(store, part, state)
    pack = store.directory(parts[0].id) / parts[2].pack
    pack.write_bytes(b"\0" * pack.stat().st_size)
    for rank in range(3):
        with pytest.raises(CorruptCheckpoint, match=rf"^{pack}: "):
            restore.read(store, pack.parent, rank)


def test_ranks_of_which_one_has_the_master_store_the_copy_once(store: Store) -> None:
    """As where the optimizer's state is dealt among the ranks."""
    master = random(8 * ELEMENTS)
    alike = {"half": master.bfloat16()}
    states = [{"m": alike, "o": {"master": master}}, {"m": alike, "o": {}}, {"m": alike, "o": {}}]
    parts = all_ranks(store, 1, states)
    assert [set(casts_of(part)) for part in parts] == [{"m/half"}, set(), set()]
    assert 0 < sum(part.stored for part in parts[1:]) < 2 * master.numel()
    for part, state in zip(parts, states, strict=True):
        assert_holds(store, part, state)


def test_another_number_of_ranks_restores_them_too(store: Store) -> None:
    training = Mixed(torch.bfloat16)
    training.step()
    state = training.state()
    parts = all_ranks(store, 1, [state] * 2)
    path = store.directory(parts[0].id)
    for rank in range(3):
        assert bytes_in(reshard.read(store, path, rank).states) == bytes_in(state)


def test_what_is_exported_is_what_was_saved(store: Store) -> None:
    training = Mixed(torch.float16)
    training.step()
    state = training.state()
    parts = all_ranks(store, 1, [state] * 2)
    gathered = gather(store, store.directory(parts[0].id))
    other = Store(store.root.parent / "imported")
    manifest = adopt(other, gathered)
    assert manifest.objects == dict(parts[0].objects)
    for rank in range(2):
        part = other.load_part(other.directory(manifest.id), rank)
        assert set(casts_of(part)) == set(casts_of(parts[rank]))
        assert_holds(other, part, state)


@pytest.mark.parametrize("change", [lambda t: t.clone(), lambda t: t.view(torch.int16) ^ 1])
def test_a_snapshot_in_memory_restores_only_what_was_saved(
    store: Store, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    master = random(1000)
    half = master.bfloat16()
    part = PartWriter(store).persist(taken(1, {"m": {"half": half, "master": master}})).part
    other = change(half).view(torch.bfloat16)
    memory = taken(1, {"m": {"half": other, "master": master}})
    path = store.directory(part.id)
    if torch.equal(other, half):
        states = restore.read(store, path, 0, memory=memory).states
        assert bytes_in(states) == bytes_in({"half": half, "master": master})
    else:
        with pytest.raises(CorruptCheckpoint, match="m/half: expected blake3:"):
            restore.read(store, path, 0, memory=memory)
