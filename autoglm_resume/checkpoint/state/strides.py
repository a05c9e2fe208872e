"""Strides: how many elements further in memory the next one of each dimension is. Pure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence


@functools.lru_cache(maxsize=1 << 14)
def in_c_order(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides that torch gives a new tensor of `shape`."""
    sizes = (max(size, 1) for size in reversed(shape[1:]))
    strides = tuple(itertools.accumulate(sizes, lambda a, b: a * b, initial=1))[::-1]
    return strides if len(shape) else ()


def in_order_of(strides: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps for `shape`, its dimensions in the order in which `strides` has them."""
    if len(strides) != len(shape):
        raise ValueError(f"strides {list(strides)} of {list(shape)}")
    found, size = [0] * len(shape), 1
    for dimension in sorted(range(len(shape)), key=lambda d: -strides[d])[::-1]:
        found[dimension] = size
        size *= max(shape[dimension], 1)
    return tuple(found)


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
