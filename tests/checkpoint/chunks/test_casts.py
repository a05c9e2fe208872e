"""What float32 determines is stored once: the cast itself."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from autoglm_resume.checkpoint.chunks import casts
from autoglm_resume.checkpoint.format.snapshot import TensorBytes
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat
from tests.checkpoint.half import HALF, both, random


def ours(dtype: str, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    target = memoryview(bytearray(2 * numbers.size))
    casts.cast(dtype, memoryview(numbers.astype("<u4").tobytes()), target)
    return np.frombuffer(target, "<u2")


def torchs(dtype: str, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    floats = torch.from_numpy(numbers.astype(np.uint32).view(np.float32).copy())
    return np.frombuffer(tree.as_bytes(floats.to(HALF[dtype])), "<u2")


def differ(dtype: str, numbers: np.ndarray[Any, Any]) -> list[str]:
    """Numbers, as bit patterns, that are cast in another way than torch does; NaN aside."""
    numbers = numbers[~np.isnan(numbers.astype(np.uint32).view(np.float32))]
    wrong = ours(dtype, numbers) != torchs(dtype, numbers)
    return [hex(number) for number in numbers[wrong][:5]]


@both
def test_every_number_of_half_precision_and_what_is_around_it_is_cast_as_torch_does(
    dtype: str,
) -> None:
    """Signed zeros, subnormals, infinities, ties to either side, and what overflows."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(HALF[dtype])
    every = patterns.float().numpy().view(np.uint32)
    finite = every[np.isfinite(every.view(np.float32))]
    tie = 1 << (15 if dtype == "bfloat16" else 12)
    for apart in (0, 1, -1, tie - 1, tie, tie + 1, 2 * tie - 1):
        assert differ(dtype, every + np.uint32(apart % 2**32)) == []
    # Half way to the next in real numbers, which among subnormals is no fixed distance of bits.
    ordered = np.unique(finite.view(np.float32).astype(np.float64))
    ties = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32).view(np.uint32)
    for apart in (0, 1, -1):
        assert differ(dtype, ties + np.uint32(apart % 2**32)) == []
    assert ours(dtype, every)[np.isfinite(every.view(np.float32))].size == finite.size


@both
@given(numbers=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
@settings(max_examples=300)
def test_any_number_is_cast_as_torch_does(dtype: str, numbers: list[int]) -> None:
    assert differ(dtype, np.array(numbers, np.uint32)) == []


def test_a_cast_that_this_version_does_not_know_is_not_called_corrupt() -> None:
    with pytest.raises(NewerFormat, match="a cast to 'float4', this version knows: bfloat16, fl"):
        casts.cast("float4", memoryview(bytes(8)), memoryview(bytearray(4)))


@pytest.mark.parametrize(("master", "target"), [(8, 2), (4, 4), (6, 3)])
def test_a_cast_of_another_length_is_refused(master: int, target: int) -> None:
    with pytest.raises(CorruptCheckpoint, match="cast to bfloat16: expected"):
        casts.cast("bfloat16", memoryview(bytes(master)), memoryview(bytearray(target)))


def described(**tensors: torch.Tensor) -> list[TensorBytes]:
    return [
        TensorBytes(name, tree.dtype_name(t.dtype), tuple(t.shape), tree.as_bytes(t))
        for name, t in tensors.items()
    ]


def test_a_sample_tells_which_tensors_may_belong_together() -> None:
    a, b, zeros = random(1000), random(1000, 1), torch.zeros(1000)
    tensors = described(
        **{"half": a.bfloat16(), "short": a[:999].bfloat16(), "other": a.half(), "none": a[:0]},
        **{"moment": b, "master": a.reshape(10, 100), "integers": a.long(), "zeros": zeros},
        **{"unlike": random(1000, 2).bfloat16(), "empty": a[:0].half()},
    )
    found = casts.candidates(tensors)
    assert {half: [m.name for m in fitting] for half, fitting in found.items()} == {
        "half": ["master"],
        "other": ["master"],
    }


def test_there_is_nothing_to_look_for_without_half_precision_or_float32() -> None:
    assert casts.candidates(described(a=random(10), b=random(10).double())) == {}
    assert casts.candidates(described(a=random(10).half(), b=random(10).double())) == {}


# Checkpoints
