"""What is copied at once, what beside the training, and what keeps the two apart."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import autoglm_resume as autoglm
from autoglm_resume.checkpoint.format.snapshot import ALIGNMENT
from autoglm_resume.checkpoint.state import restore
from autoglm_resume.checkpoint.state.capture import CapturedState, ObjectState, TensorTable
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.worker.saving import device_copy
from autoglm_resume.worker.saving.device_copy import (
    Changed,
    DeviceCopier,
    DeviceCopy,
    targets,
)
from autoglm_resume.worker.saving.stager import Stager
from tests.worker.alone import checkpoints, end_process, lonely

Named = list[tuple[str, torch.Tensor]]


Said = list[tuple[Exception | None, threading.Thread]]


def state_of(tensors: Named, safe: list[torch.Tensor]) -> CapturedState:
    addresses = {tensor.data_ptr() for tensor in safe}
    table = TensorTable(tensors, [tensor.data_ptr() in addresses for _, tensor in tensors])
    return CapturedState({"m": ObjectState({}, table, b"{}")})


def made(
    tensors: Named, safe: list[torch.Tensor], *, at_once: bool = False
) -> tuple[DeviceCopy, list[torch.Tensor]]:
    said: Said = []

    def done(error: Exception | None) -> None:
        said.append((error, threading.current_thread()))

    state = state_of(tensors, safe)
    slot = memoryview(bytearray(state.size + ALIGNMENT))
    copy = DeviceCopier().copy(state, 0, slot, done, at_once=at_once)
    OUTCOMES[copy] = said
    return copy, targets(state.objects["m"].table, slot)


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
    into = targets(TensorTable(tensors), memoryview(slot))
    assert [(t.dtype, t.shape) for t in into] == [(t.dtype, t.shape) for _, t in tensors]
    into[0].fill_(1)
    into[2].fill_(2)
    into[3].copy_(torch.arange(6).reshape(3, 2))
    assert bytes(slot[:6]) == b"\x80\x3f" * 3
    assert bytes(slot[ALIGNMENT : ALIGNMENT + 4]) == b"\0\0\0\x40"
    assert bytes(slot[2 * ALIGNMENT + 4 : 2 * ALIGNMENT + 8]) == b"\0\0\x80\x3f"


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
    for safe, at_once in (([], False), (list(kinds.values()), False), ([], True)):
        copy, into = made(list(kinds.items()), safe, at_once=at_once)
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


def test_a_sparse_change_in_a_large_tensor_is_noticed_where_it_is_sampled() -> None:
    weight = torch.randn(1 << 20)
    copy, _ = made([("w", weight)], [weight])
    weight.data[device_copy.STRIDE : device_copy.STRIDE + device_copy.STRIDE // 4].mul_(0.5)
    assert isinstance(run(copy), Changed)


@pytest.mark.parametrize("through", ["data", "numpy", "one byte"])
def test_every_change_before_the_step_shows_in_a_copy_that_was_made_at_once(through: str) -> None:
    other, weight = torch.randn(3), torch.randn(100_000)
    copy, into = made([("other", other), ("w", weight)], [other, weight], at_once=True)
    assert torch.equal(into[1], weight)
    assert run(copy) is None
    assert copy.changed() == ""
    match through:
        case "data":
            weight.data[77_777] += 1
        case "numpy":
            weight.numpy()[77_777] += 1
        case "one byte":
            weight.view(torch.uint8).numpy()[33_333] ^= 1
    assert copy.changed() == "w"


def test_a_nan_is_no_change() -> None:
    weight = torch.full((10,), float("nan"))
    copy, _ = made([("w", weight)], [weight], at_once=True)
    assert run(copy) is None
    assert copy.changed() == ""


def test_the_next_copies_look_at_the_tensors_that_are_there_then() -> None:
    copier, weight = DeviceCopier(), torch.randn(1000)
    for grown in range(6):
        sources = [
            ("w", weight),
            ("more", torch.randn(10 + grown)),
            ("turned", weight.view(2, -1).T),
        ]
        state = state_of(sources, [tensor for _, tensor in sources])
        slot = memoryview(bytearray(state.size))
        into = targets(state.objects["m"].table, slot)
        said: list[Exception | None] = []
        copy = copier.copy(state, grown % 2, slot, said.append, at_once=False)
        copy.start()
        copy.wait()
        assert said == [None]
        assert all(torch.equal(s, t) for (_, s), t in zip(sources, into, strict=True))
        copy = copier.copy(state, grown % 2, slot, said.append, at_once=False)
        weight.data.add_(1)
        copy.start()
        copy.wait()
        assert isinstance(said[1], Changed)


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


def stager_of(training: Training) -> Stager:
    stager = training.session._saves._stager
    assert stager is not None
    return stager


@pytest.mark.usefixtures("alone")
def test_a_step_that_follows_at_once_waits_for_the_copy() -> None:
    training = Training(4 << 20)
    for _ in range(6):
        training.step()
    training.optimizer.step()
    training.assert_exact([1, 2, 3, 4, 5, 6])
    assert stager_of(training)._timing.proofs == 2


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


def decay(weight: torch.nn.Parameter) -> None:
    weight.data.mul_(0.5)


def sparse_decay(weight: torch.nn.Parameter) -> None:
    weight.data[0, 54_321] *= 0.5


def through_numpy(weight: torch.nn.Parameter) -> None:
    weight.detach().numpy()[0, 7] = 3


def from_a_vector(weight: torch.nn.Parameter) -> None:
    torch.nn.utils.vector_to_parameters(torch.full((weight.numel(),), 2.0), [weight])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("change", [decay, sparse_decay, through_numpy, from_a_vector])
def test_a_loop_that_changes_weights_before_the_step_saves_them_as_they_were_every_time(
    change: Callable[[torch.nn.Parameter], None],
) -> None:
    training = Training(100_000)
    for _ in range(6):
        training.step()
        change(training.model.weight)
    training.optimizer.step()
    end_process()
    training.assert_exact([1, 2, 3, 4, 5, 6])


@pytest.mark.usefixtures("alone")
def test_steps_that_pass_no_hook_are_saved_as_they_were() -> None:
    training = Training(100_000)
    weight = training.model.weight
    for step in range(6):
        # As a whole step that is replayed from a CUDA graph: nothing of Python sees it.
        weight.data.view(torch.uint8).numpy()[...] = step
        training.saved[step + 1] = weight.detach().clone()
        training.session.step_done(step)
    end_process()
    training.assert_exact([1, 2, 3, 4, 5, 6])
    assert stager_of(training)._timing.changed == "model/weight"


@pytest.mark.usefixtures("alone")
def test_an_optimizer_within_the_backward_pass_is_waited_for() -> None:
    training = Training(100_000)
    weight = training.model.weight

    def within_backward(parameter: torch.Tensor) -> None:
        parameter.data.sub_(1)

    weight.register_post_accumulate_grad_hook(within_backward)
    for step in range(6):
        training.model(torch.ones(1, 100_000)).sum().backward()
        training.saved[step + 1] = weight.detach().clone()
        training.session.step_done(step)
    end_process()
    training.assert_exact([1, 2, 3, 4, 5, 6])


@pytest.mark.usefixtures("alone")
def test_what_is_changed_behind_our_back_fails_that_save_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    training = Training(1000)
    begun: Callable[[DeviceCopy], None] = DeviceCopy.start

    def start(copy: DeviceCopy) -> None:
        if training.session.step == 4:
            with torch.no_grad():
                training.model.weight.mul_(2)
        begun(copy)

    monkeypatch.setattr(device_copy.DeviceCopy, "start", start)
    for _ in range(6):
        training.step()
    end_process()
    training.assert_exact([1, 2, 3, 5, 6])
    said = capfd.readouterr().err
    assert "model/weight was changed before optimizer.step(), while it was copied" in said
    assert "training goes on" in said


def test_a_copy_is_made_even_when_the_interpreter_is_shutting_down() -> None:
    weight, copier = torch.ones(1000), DeviceCopier()
    copier._thread.shutdown()
    state, said = state_of([("w", weight)], [weight]), list[Exception | None]()
    slot = memoryview(bytearray(state.size))
    copy = copier.copy(state, 0, slot, said.append, at_once=False)
    copy.start()
    copy.wait()
    assert said == [None]
    assert targets(state.objects["m"].table, slot)[0].eq(1).all()
