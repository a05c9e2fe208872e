"""Checkpoints that the version before has written, as it wrote them, in `data/`.

`ranks` has two of two ranks, by `compress: small`: chunks that ranks share, that are taken from the
older checkpoint, that are the difference to it, and casts. `session` is of a script alone.
"""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.commit import sweep, whole
from autoglm_resume.checkpoint.store.examine import candidates, examine
from autoglm_resume.checkpoint.store.gate import Expectation, choose
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.checkpoint.write.reuse import PreviousPart
from autoglm_resume.observe import inspection
from tests.worker.alone import lonely

DATA = Path(__file__).parent / "data"
STEPS = {10: checkpoint_id(10, "a0"), 20: checkpoint_id(20, "a1")}


def state_of(step: int, rank: int) -> dict[str, Any]:
    """What was saved: the model alike on all ranks, half of it the cast of the other half."""
    weight = (torch.arange(4096, dtype=torch.float32) * (1 + step / 1024)).reshape(64, 64)
    count = torch.tensor(float(step))
    return {
        "model": OrderedDict(w=weight, tied=weight, half=weight.bfloat16(), empty=torch.zeros(0)),
        "optimizer": {"state": {0: {"step": count, "exp_avg": weight / 2}}, "lr": (0.1, 1e-3)},
        "rng": {"torch": torch.arange(64, dtype=torch.uint8) + rank, "python": (3, [rank, 2**80])},
        "odd": {
            "$x": float("inf"),
            (1, 2): Counter("aab"),
            "d": defaultdict(list, a=[b"\x00"]),
            "types": {name: torch.ones(3).to(getattr(torch, name)) for name in ("int16", "bool")},
        },
    }


def spelt(value: Any) -> Any:
    """Equal only where types and bits are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return type(value), factory, [(spelt(key), spelt(child)) for key, child in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [spelt(child) for child in value]
    return type(value), value


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Path(shutil.copytree(DATA / "ranks", tmp_path / "ranks")))


def test_every_byte_is_verified_and_nothing_is_taken_for_left_over(store: Store) -> None:
    found = list(candidates(store, deep=True))
    assert [each.id for each in found] == [STEPS[20], STEPS[10]]
    assert all(each.integrity.ok and each.integrity.how == "content" for each in found)
    assert whole(store) == sweep(store) == []


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_state_comes_back_bit_by_bit(store: Store, step: int, rank: int) -> None:
    restored = restore.read(store, store.directory(STEPS[step]), rank)
    assert spelt(restored.states) == spelt(state_of(step, rank))


def test_the_gate_takes_the_newest_for_the_model_that_saved_it(store: Store) -> None:
    model = capture.structure_of(state_of(0, 0)["model"])
    accepted = choose(candidates(store), Expectation(2, model.hash, model)).accepted
    assert accepted is not None
    assert (accepted.id, accepted.model) == (STEPS[20], model)
    assert choose(candidates(store), Expectation(3, model.hash, model)).accepted is None


def test_it_is_inspected_down_to_every_tensor(store: Store) -> None:
    target = inspection.find(store.directory(STEPS[20]))
    found = inspection.inspect(target, target.paths[0], None)
    names = {tensor.name for _, tensor in found.tensors}
    assert {"model/w", "model/half", "optimizer/state.0.exp_avg", "rng/torch"} <= names
    assert found.verdict.step == 20


def test_the_next_checkpoint_builds_upon_it(store: Store) -> None:
    id = checkpoint_id(30, "a2")
    writers = [PartWriter(store, SaveOptions("small"), share=False) for _ in range(2)]
    for rank, writer in enumerate(writers):
        old = restore.read(store, store.directory(STEPS[20]), rank)
        writer.follow(PreviousPart(old.part))
        taken = capture.take(
            state_of(20, rank), id=id, rank=rank, world_size=2, lineage=(STEPS[20], STEPS[10])
        )
        saved = writer.persist(taken)
    assert saved.manifest is not None
    assert saved.manifest.parent is not None
    assert saved.manifest.parent.id == STEPS[20]
    assert STEPS[10] in saved.manifest.needs, "what it has unchanged is not stored again"
    assert examine(store, store.directory(id), deep=True).integrity.ok
    found = restore.read(store, store.directory(id), 1).states
    assert spelt(found) == spelt(state_of(20, 1))


def train(steps: int, session: Any = None) -> torch.Tensor:
    model = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).reshape(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    if session is not None:
        session.track(model=model, optimizer=optimizer)
        assert session.resume() == 3
    for _ in range(steps) if session is None else session.steps(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    return model.weight.detach()


def test_a_script_alone_goes_on_from_it_as_if_nothing_had_happened(tmp_path: Path) -> None:
    shutil.copytree(DATA / "session", tmp_path / "ckpt")
    undisturbed = train(6)
    with lonely(tmp_path):
        session = autoglm.init(checkpoint_dir="ckpt")
        weight = train(6, session)
        assert session.step == 6
    assert torch.equal(weight, undisturbed)
    assert len(Store(tmp_path / "ckpt").committed()) == 2
