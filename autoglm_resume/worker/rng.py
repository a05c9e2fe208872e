"""Every random generator of a process: Python, NumPy, torch on the CPU and each CUDA device."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from blake3 import blake3


def capture() -> dict[str, Any]:
    """The state of all generators. NumPy and CUDA only where this process uses them."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
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


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(seed % 2**32)


def restore(state: dict[str, Any]) -> None:
    """Continue every generator where `capture` saw it."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        for generator, saved in zip(torch.cuda.default_generators, state["cuda"], strict=False):
            generator.set_state(saved)
