from __future__ import annotations

import itertools

import torch

from autoglm_resume.checkpoint.chunks.cut import items_of
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from tests.checkpoint.series import taken


def test_chunks_of_all_tensors_are_in_their_order() -> None:
    tensors = {
        "a": torch.zeros(CHUNK_BYTES // 4 * 2 + 1),
        "empty": torch.zeros(0),
        "b": torch.ones(3),
    }
    items = items_of(taken(1, tensors))
    assert [(i.tensor, i.index, len(i.raw)) for i in items] == [
        ("m/a", 0, CHUNK_BYTES),
        ("m/a", 1, CHUNK_BYTES),
        ("m/a", 2, 4),
        ("m/b", 0, 12),
    ]
    assert items[0].named().name == items[1].named().name != items[2].named().name
    assert len(set(itertools.chain.from_iterable(i.raw for i in items[:2]))) == 1
