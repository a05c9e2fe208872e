from __future__ import annotations

import pytest

from autoglm_resume.checkpoint.format.renaming import Fit, applied, fit, renamed
from autoglm_resume.checkpoint.format.structure import Structure


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("model.layers.0.weight", "model.blocks.0.weight"),
        ("model.layers.1.weight", "model.special.weight"),
        ("model.layersize", "model.layersize"),
        ("model.head.bias", "model.out.b"),
        ("model.head.weight", "model.head.weight"),
        ("ema.layers.0.weight", "ema.other.0.weight"),
        ("model.model.x", "model.inner.x"),
        ("model.x", "model.x"),
        ("model", "model"),
    ],
)
def test_the_longest_name_decides_and_a_full_one_before_a_bare_one(name: str, new: str) -> None:
    rename = {
        "layers": "blocks",
        "layers.1": "special",
        "head.bias": "out.b",
        "ema.layers": "ema.other",
        "model": "inner",
    }
    assert renamed(name, rename) == new


def structure(**shapes: tuple[int, ...]) -> Structure:
    return Structure.of([(f"model.{name}", "float32", shape) for name, shape in shapes.items()])


def test_what_is_left_over_on_both_sides_is_listed_with_its_shape() -> None:
    before = structure(same=(2,), grown=(3, 2), gone=(1,), old=(4,))
    now = structure(same=(2,), grown=(5, 2), new=(7,), young=(4,))
    assert fit(applied(before, {"old": "young"}), now) == Fit(
        ("model.gone [1]", "model.grown [3, 2]"), ("model.grown [5, 2]", "model.new [7]")
    )
    assert fit(now, now) == Fit((), ())
