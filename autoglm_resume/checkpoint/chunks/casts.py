"""Chunks of half precision that are the cast of float32 beside them, and need not be stored.

Mixed-precision training holds its weights twice: bfloat16 or float16 for the model, float32 for the
optimizer (its master weights), and the one is the other rounded to nearest, ties to even. Which
tensor belongs to which is not asked of any optimizer but found in the bytes: a sample tells which
pairs to look at, and a chunk is left out only if casting gives every one of its bytes.

So nothing depends on who cast it and how. Rounding to bfloat16 is done on the bit patterns, and
gives the same bytes on every machine, for NaN as well (though others than torch, whose processors
and devices disagree: such a chunk is stored). Where float16 has a NaN it is stored, because there
NumPy leaves the bytes to the processor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from autoglm_resume.checkpoint.chunks.cut import Item, Position
from autoglm_resume.checkpoint.format.snapshot import TensorBytes
from autoglm_resume.checkpoint.format.tables import CAST_FACTOR, CHUNK_BYTES
from autoglm_resume.errors import CorruptCheckpoint, NewerFormat

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import numpy.typing as npt

    Numbers: TypeAlias = npt.NDArray[Any]

MASTER = "float32"
CASTS = ("bfloat16", "float16")

_SAMPLES = 64
"""Elements, at equal distances; at most twice as many."""
_CANDIDATES = 4
"""Tensors whose sample fits are as a rule one; more only where there is nothing but zeros."""


@dataclass(frozen=True)
class Cast:
    """A chunk that is the cast of those at `sources`."""

    item: Item
    sources: tuple[Position, ...]


def cast(dtype: str, master: memoryview, target: memoryview) -> None:
    """Fill `target` with the float32 of `master`, rounded to `dtype`; little-endian, all of it.

    Raises CorruptCheckpoint for a length that does not fit, and NewerFormat for another dtype.
    """
    import numpy as np

    if dtype not in CASTS:
        raise NewerFormat(
            f"a chunk is a cast to {dtype!r}, this version knows: {', '.join(CASTS)}",
            hint="upgrade autoglm-resume to the version that wrote the checkpoint",
        )
    if master.nbytes != CAST_FACTOR * target.nbytes or master.nbytes % 4:
        raise CorruptCheckpoint(
            f"cast to {dtype}: expected {CAST_FACTOR * target.nbytes} bytes of whole numbers, found"
            f" {master.nbytes}"
        )
    _cast(dtype, np.frombuffer(master, "<u4"), np.frombuffer(target, "<u2"))


def find(
    tensors: Sequence[TensorBytes], items: Iterable[Item], pool: Executor
) -> dict[Position, Cast]:
    """The chunks among `items` that are a cast of others, by their positions; `tensors` are all."""
    masters = candidates(tensors)
    if not masters:
        return {}
    wanted = [item for item in items if item.tensor in masters]
    found = pool.map(lambda item: _derive(item, masters[item.tensor]), wanted)
    return {each.item.position: each for each in found if each}


def candidates(tensors: Sequence[TensorBytes]) -> Mapping[str, Sequence[TensorBytes]]:
    """For tensors of half precision, by name: those of float32 that they may be the cast of."""
    halves = [tensor for tensor in tensors if tensor.dtype in CASTS and tensor.nbytes]
    if not halves:
        return {}
    dtypes, counts = {half.dtype for half in halves}, {_count(half) for half in halves}
    masters: dict[tuple[int, str, bytes], list[TensorBytes]] = defaultdict(list)
    for tensor in tensors:
        if tensor.dtype == MASTER and _count(tensor) in counts:
            numbers = _sample(tensor, "<u4")
            for dtype in dtypes:
                masters[_count(tensor), dtype, _rounded(dtype, numbers).tobytes()].append(tensor)
    found = {
        half.name: masters.get((_count(half), half.dtype, _sample(half, "<u2").tobytes()), [])
        for half in halves
    }
    return {name: fitting[:_CANDIDATES] for name, fitting in found.items() if fitting}


def _derive(item: Item, masters: Sequence[TensorBytes]) -> Cast | None:
    import numpy as np

    chunk = np.frombuffer(item.raw, "<u2")
    begin, size = CAST_FACTOR * item.index * CHUNK_BYTES, CAST_FACTOR * len(item.raw)
    for master in masters:
        numbers = np.frombuffer(master.data[begin : begin + size], "<u4")
        if item.dtype == "float16" and np.isnan(numbers.view("<f4")).any():
            continue
        if np.array_equal(_rounded(item.dtype, numbers), chunk):
            first, last = begin // CHUNK_BYTES, -(-(begin + size) // CHUNK_BYTES)
            return Cast(item, tuple((master.name, index) for index in range(first, last)))
    return None


def _count(tensor: TensorBytes) -> int:
    """Of elements."""
    return tensor.nbytes // (4 if tensor.dtype == MASTER else 2)


def _sample(tensor: TensorBytes, kind: str) -> Numbers:
    import numpy as np

    numbers: Numbers = np.frombuffer(tensor.data, kind)
    return np.ascontiguousarray(numbers[:: max(1, numbers.size // _SAMPLES)])


def _rounded(dtype: str, numbers: Numbers) -> Numbers:
    import numpy as np

    target = np.empty(numbers.size, "<u2")
    _cast(dtype, numbers, target)
    return target


def _cast(dtype: str, numbers: Numbers, target: Numbers) -> None:
    import numpy as np

    if dtype == "float16":
        with np.errstate(all="ignore"):
            target.view("<f2")[:] = numbers.view("<f4")
        return
    # Half a unit of the last place that stays is added, less a bit where that place is even.
    rounded = numbers >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += numbers
    target[:] = rounded.view("<u2")[1::2]
