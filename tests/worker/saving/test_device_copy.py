"""What is copied at once, what beside the training, and what keeps the two apart."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.format.snapshot import ALIGNMENT, layout
from autoglm_resume.checkpoint.state import restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.worker.saving import device_copy
from autoglm_resume.worker.saving.device_copy import (
    Changed,
    DeviceCopier,
    DeviceCopy,
    safe_until_step,
    targets,
)
from tests.worker.alone import checkpoints, end_process, lonely

Named = list[tuple[str, torch.Tensor]]


Said = list[tuple[Exception | None, threading.Thread]]


def made(tensors: Named, safe: list[torch.Tensor]) -> tuple[DeviceCopy, list[torch.Tensor]]:
    said: Said = []

    def done(error: Exception | None) -> None:
        said.append((error, threading.current_thread()))

    _, end = layout(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    into = targets(tensors, memoryview(bytearray(end + ALIGNMENT)))
    copy = DeviceCopier().copy(tensors, into, frozenset(tensor.data_ptr() for tensor in safe), done)
    OUTCOMES[copy] = said
    return copy, into


OUTCOMES: weakref.WeakKeyDictionary[DeviceCopy, Said] = weakref.WeakKeyDictionary()


def run(copy: DeviceCopy) -> Exception | None:
    """To its end; what became of it."""
    copy.start()
    copy.wait()
    ((error, thread),) = OUTCOMES[copy]
    assert thread != threading.current_thread()
    return error


def test_targets_lie_in_the_slot_where_a_snapshot_has_them() -> None:
    tensors = [
        ("a", torch.zeros(3, dtype=torch.bfloat16)),
        ("nothing", torch.zeros(0, 4)),
        ("scalar", torch.tensor(1.5)),
        ("turned", torch.zeros(2, 3).T),
    ]
    slot = bytearray(4 * ALIGNMENT)
    into = targets(tensors, memoryview(slot))
    assert [(t.dtype, t.shape) for t in into] == [(t.dtype, t.shape) for _, t in tensors]
    into[0].fill_(1)
    into[2].fill_(2)
    into[3].copy_(torch.arange(6).reshape(3, 2))
    assert bytes(slot[:6]) == b"\x80\x3f" * 3
    assert bytes(slot[ALIGNMENT : ALIGNMENT + 4]) == b"\0\0\0\x40"
    assert bytes(slot[2 * ALIGNMENT + 4 : 2 * ALIGNMENT + 8]) == b"\0\0\x80\x3f"


def test_only_what_the_optimizers_step_changes_is_safe_until_then() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    first = torch.optim.AdamW(model[0].parameters())
    other = torch.nn.Linear(2, 2)
    second = torch.optim.SGD([{"params": [other.weight]}], momentum=0.9)
    model(torch.randn(3, 2)).sum().backward()
    other(torch.randn(3, 2)).sum().backward()
    first.step()
    second.step()
    moments = [v for state in first.state.values() for v in state.values()]
    moments += [state["momentum_buffer"] for state in second.state.values()]
    expected = [*model[0].parameters(), other.weight, *moments]
    assert safe_until_step([first, second]) == {tensor.data_ptr() for tensor in expected}
    assert model[1].weight.data_ptr() not in safe_until_step([first, second])
    assert model[1].running_mean.data_ptr() not in safe_until_step([first, second])
    assert safe_until_step([]) == frozenset()


def test_what_is_not_safe_is_copied_at_once_and_the_rest_later() -> None:
    safe, unsafe = torch.ones(1000), torch.ones(1000)
    copy, into = made([("safe", safe), ("unsafe", unsafe)], [safe])
    unsafe.fill_(2)
    assert into[1].eq(1).all()
    assert into[0].eq(0).all()
    assert run(copy) is None
    assert into[0].eq(1).all()
    assert into[1].eq(1).all()


def test_every_kind_of_tensor_arrives_as_its_values() -> None:
    plain = torch.randn(6, 4)
    with torch.inference_mode():
        inference = torch.randn(5)
    kinds = {
        "transposed": plain.T,
        "sliced": plain[::2, 1:3],
        "expanded": plain[0].expand(3, 4),
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
        "half": plain.half(),
        "bools": plain > 0,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "inference": inference,
    }
    for safe in ([], list(kinds.values())):
        copy, into = made(list(kinds.items()), safe)
        assert run(copy) is None
        for name, target in zip(kinds, into, strict=True):
            assert torch.equal(target, kinds[name]), name
            assert target.is_contiguous()


def test_a_tensor_without_a_version_is_copied_at_once() -> None:
    with torch.inference_mode():
        tensor = torch.ones(10)
        copy, into = made([("x", tensor)], [tensor])
        tensor.fill_(2)
    assert run(copy) is None
    assert into[0].eq(1).all()


@pytest.mark.parametrize("through", ["itself", "a view", "a detached one"])
def test_a_change_while_it_was_copied_is_noticed_by_name(through: str) -> None:
    first, second = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    sources = [("first", first.detach()), ("second", second.detach())]
    copy, _ = made(sources, [first, second])
    with torch.no_grad():
        changed = {"itself": second, "a view": second[2:4], "a detached one": second.detach()}
        changed[through].add_(1)
    error = run(copy)
    assert isinstance(error, Changed)
    assert str(error) == "second"


def test_a_change_behind_autograds_back_is_noticed_too() -> None:
    other, weight = torch.randn(3), torch.randn(1000)
    copy, _ = made([("other", other), ("w", weight)], [other, weight])
    weight.data.mul_(0.5)
    assert weight._version == 0
    error = run(copy)
    assert isinstance(error, Changed)
    assert str(error) == "w"


def test_a_tensor_in_another_order_whose_changes_would_go_unnoticed_is_copied_at_once() -> None:
    weight = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copy, into = made([("w", weight)], [weight])
    weight.data.mul_(0.5)
    assert run(copy) is None
    assert into[0].eq(1).all()


def test_the_next_copies_look_at_the_tensors_that_are_there_then() -> None:
    copier, weight = DeviceCopier(), torch.randn(1000)
    for grown in range(6):
        sources = [
            ("w", weight),
            ("more", torch.randn(10 + grown)),
            ("turned", weight.view(2, -1).T),
        ]
        into = [torch.empty(tensor.shape) for _, tensor in sources]
        safe = frozenset(tensor.data_ptr() for _, tensor in sources)
        said: list[Exception | None] = []
        copier.copy(sources, into, safe, said.append).wait()
        assert said == [None]
        assert all(torch.equal(s, t) for (_, s), t in zip(sources, into, strict=True))
        copy = copier.copy(sources, into, safe, said.append)
        weight.data.add_(1)
        copy.wait()
        assert isinstance(said[1], Changed)


def test_steps_that_may_be_replayed_from_a_graph_make_nothing_safe() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert safe_until_step([torch.optim.AdamW([weight])])
    assert not safe_until_step([torch.optim.AdamW([weight], capturable=True)])


def test_whatever_goes_wrong_in_the_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(3)
    copy, _ = made([("x", tensor)], [tensor])
    tensor.resize_(5)
    assert isinstance(run(copy), RuntimeError)


# In a session


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


class Training:
    """Saves at every step; what it had at each save is kept aside."""

    def __init__(self, size: int) -> None:
        self.model = torch.nn.Linear(size, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.session = autoglm.init(checkpoint_dir="ckpt", every_steps=1, keep=100)
        self.session.track(model=self.model, optimizer=self.optimizer)
        self.session.resume()
        self.model.weight.grad = torch.ones_like(self.model.weight)
        self.saved: dict[int, torch.Tensor] = {}

    def step(self) -> None:
        self.optimizer.step()
        self.saved[self.session.step + 1] = self.model.weight.detach().clone()
        self.session.step_done(self.session.step)

    def assert_exact(self, steps: list[int]) -> None:
        store, names = Store(Path("ckpt")), checkpoints()
        assert [int(name[5:15]) for name in names] == steps
        for step, name in zip(steps, names, strict=True):
            found = restore.read(store, store.directory(name), 0).states["model"]["weight"]
            assert torch.equal(found, self.saved[step])


@pytest.mark.usefixtures("alone")
def test_a_step_that_follows_at_once_waits_for_the_copy() -> None:
    training = Training(4 << 20)
    for _ in range(6):
        training.step()
    training.optimizer.step()
    training.assert_exact([1, 2, 3, 4, 5, 6])


@pytest.mark.usefixtures("alone")
def test_a_step_of_any_optimizer_waits() -> None:
    training = Training(4 << 20)
    training.step()
    training.step()
    another = torch.optim.SGD(training.model.parameters(), lr=3.0)
    another.step()
    training.assert_exact([1, 2])


@pytest.mark.usefixtures("alone")
def test_an_evaluation_that_swaps_weights_costs_one_save_at_most_and_tears_none() -> None:
    training = Training(4 << 20)
    for _ in range(5):
        training.step()
        weight = training.model.weight
        own = weight.data.clone()
        weight.data.fill_(7)
        training.model.eval()(torch.ones(1, 4 << 20))
        weight.data.copy_(own)
        training.model.train()(torch.ones(1, 4 << 20))
    training.optimizer.step()
    there = [int(name[5:15]) for name in checkpoints()]
    assert len(there) >= 4
    training.assert_exact(there)


@pytest.mark.usefixtures("alone")
def test_what_is_changed_behind_our_back_fails_that_save_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    training = Training(1000)
    begun: Callable[[DeviceCopy], None] = DeviceCopy.start

    def start(copy: DeviceCopy) -> None:
        if training.session.step == 2:
            with torch.no_grad():
                training.model.weight.mul_(2)
        begun(copy)

    monkeypatch.setattr(device_copy.DeviceCopy, "start", start)
    for _ in range(4):
        training.step()
    end_process()
    training.assert_exact([1, 3, 4])
    said = capfd.readouterr().err
    assert "model/weight was changed before optimizer.step(), while it was copied" in said
    assert "training goes on" in said


def test_a_copy_is_made_even_when_the_interpreter_is_shutting_down() -> None:
    weight, copier = torch.ones(1000), DeviceCopier()
    copier._thread.shutdown()
    into, said = torch.zeros(1000), list[Exception | None]()
    copy = copier.copy([("w", weight)], [into], frozenset([weight.data_ptr()]), said.append)
    copy.wait()
    assert said == [None]
    assert into.eq(1).all()
