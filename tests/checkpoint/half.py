"""Tensors of half precision."""

from __future__ import annotations

import pytest
import torch

from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
both = pytest.mark.parametrize("dtype", list(HALF))
ELEMENTS = CHUNK_BYTES // 2
"""Of half precision in one chunk."""


def random(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# The cast
