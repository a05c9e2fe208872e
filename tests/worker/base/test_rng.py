from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from autoglm_resume.checkpoint.state import decoding, tree
from autoglm_resume.worker.base import rng


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    before = rng.capture()
    yield
    rng.restore(before)


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(9).tolist(),
        numpy.random.rand(3).tolist(),
        numpy.random.normal(),
    ]


@pytest.mark.parametrize("drawn_before", range(3))
def test_every_generator_continues_where_it_was(drawn_before: int) -> None:
    random.seed(1)
    torch.manual_seed(2)
    numpy.random.seed(3)
    for _ in range(drawn_before):
        draw()
    state = rng.capture()
    expected = [draw(), draw()]
    for _ in range(3):
        draw()
    rng.restore(state)
    assert [draw(), draw()] == expected


def test_a_capture_is_not_changed_by_later_draws_and_draws_nothing_itself() -> None:
    random.seed(1)
    torch.manual_seed(2)
    numpy.random.seed(3)
    first = draw()
    random.seed(1)
    torch.manual_seed(2)
    numpy.random.seed(3)
    rng.capture()
    assert draw() == first


def test_a_capture_survives_a_checkpoint() -> None:
    state = rng.capture()
    expected = draw()
    encoded, tensors = tree.encode(state, "rng")
    rng.restore(decoding.decode(encoded, {name: tensor.clone() for name, tensor in tensors}))
    assert draw() == expected


def test_a_state_of_a_process_without_numpy_leaves_numpy_alone() -> None:
    state = rng.capture()
    del state["numpy"]
    numpy.random.seed(5)
    expected = numpy.random.RandomState(5).rand()
    rng.restore(state)
    assert numpy.random.rand() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_continues_too() -> None:
    torch.cuda.manual_seed_all(1)
    state = rng.capture()
    devices = range(torch.cuda.device_count())
    expected = [torch.rand(3, device=f"cuda:{n}").tolist() for n in devices]
    rng.restore(state)
    assert [torch.rand(3, device=f"cuda:{n}").tolist() for n in devices] == expected
