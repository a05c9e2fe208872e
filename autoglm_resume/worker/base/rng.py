"""Every random generator of a process: Python, NumPy, torch on the CPU and each CUDA device."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from blake3 import blake3

NEAR = 100
"""Entries of a list in which a generator is looked for; what has more is data."""

OUTSIDE = (type, ModuleType)
"""What an object only knows of, and does not hold."""


def capture() -> dict[str, Any]:
    """The state of all generators. NumPy and CUDA only where this process uses them."""
    version, words, gauss = random.getstate()
    # Packed: walking 625 numbers was half of what describing a model of 900 tensors took.
    packed = struct.pack(f"<{len(words)}I", *words)
    state: dict[str, Any] = {"python": (version, packed, gauss), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [generator.get_state() for generator in torch.cuda.default_generators]
    return state


def derive(text: str) -> None:
    """Seed every generator of this process from `text`, the same for the same text."""
    _seed(seed := seed_from(text))
    torch.manual_seed(seed)


def seed_from(text: str) -> int:
    """The same for the same text."""
    return int.from_bytes(blake3(text.encode()).digest(8), "big") >> 1


@contextmanager
def kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generator on the CPU go on afterwards where they were."""
    numpy = sys.modules.get("numpy")
    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(legacy)


@contextmanager
def derived(text: str) -> Iterator[None]:
    """Meanwhile, what these three draw follows from `text`."""
    with kept():
        _seed(seed := seed_from(text))
        # Not torch.manual_seed, which is for all devices, and slow.
        torch.default_generator.manual_seed(seed)
        yield


def held_by(obj: Any) -> str:
    """Where in `obj` a generator of its own is, as `Name.attribute[0]`; empty if none is near."""
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if (numpy := sys.modules.get("numpy")) is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    queue, seen = [(type(obj).__name__, obj)], {id(obj)}
    for where, at in queue:
        if isinstance(at, kinds):
            return where
        inside = [(f"{where}.{name}", value) for name, value in getattr(at, "__dict__", {}).items()]
        if isinstance(at, (list, tuple)) and len(at) <= NEAR:
            inside += [(f"{where}[{index}]", value) for index, value in enumerate(at)]
        elif isinstance(at, dict) and len(at) <= NEAR:
            inside += [(f"{where}[{key!r}]", value) for key, value in at.items()]
        for name, value in inside:
            if len(queue) < 100 * NEAR and id(value) not in seen and not isinstance(value, OUTSIDE):
                seen.add(id(value))
                queue.append((name, value))
    return ""


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(seed % 2**32)


def restore(state: dict[str, Any]) -> None:
    """Continue every generator where `capture` saw it."""
    version, words, gauss = state["python"]
    if isinstance(words, bytes):  # older checkpoints have the numbers
        words = struct.unpack(f"<{len(words) // 4}I", words)
    random.setstate((version, words, gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for generator, saved in zip(torch.cuda.default_generators, state["cuda"], strict=False):
            generator.set_state(saved)
