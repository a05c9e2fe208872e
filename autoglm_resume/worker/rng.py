"""Every random generator of a process: Python, NumPy, torch on the CPU and each CUDA device."""

from __future__ import annotations

import random
import sys
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
    seed = int.from_bytes(blake3(text.encode()).digest(8), "big") >> 1
    random.seed(seed)
    torch.manual_seed(seed)
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
