from __future__ import annotations

import json

import pytest

from autoglm_resume.checkpoint.format.structure import Structure, combined, differences
from autoglm_resume.errors import CorruptCheckpoint

A = Structure.of([("b", "float32", (2,)), ("a", "float32", (128, 64))], {"model.yaml": "blake3:1"})


def test_the_hash_does_not_depend_on_the_order_given() -> None:
    again = Structure.of([("a", "float32", (128, 64)), ("b", "float32", (2,))], dict(A.config))
    assert again.hash == A.hash


@pytest.mark.parametrize(
    "other",
    [
        Structure.of([("a", "float32", (128, 64))], dict(A.config)),
        Structure.of([("b", "float16", (2,)), ("a", "float32", (128, 64))], dict(A.config)),
        Structure.of([("b", "float32", (3,)), ("a", "float32", (128, 64))], dict(A.config)),
        Structure.of(A.tensors, {"model.yaml": "blake3:2"}),
        Structure.of(A.tensors),
    ],
)
def test_any_change_changes_the_hash_and_is_named(other: Structure) -> None:
    assert other.hash != A.hash
    assert len(differences(A, other)) == 1


def test_differences_read_as_sentences_and_are_limited() -> None:
    model = Structure.of([("a", "float32", (128, 32)), ("c", "int64", ())], {"model.yaml": "x"})
    assert differences(A, model) == [
        "a: [128, 64] float32 in the checkpoint, [128, 32] float32 in this model",
        "only in the checkpoint: b [2] float32",
        "only in this model: c [] int64",
        "config model.yaml: blake3:1 in the checkpoint, x in this model",
    ]
    assert differences(A, model, limit=1)[1:] == ["and 3 more"]


def test_json_brings_it_back_and_refuses_what_it_is_not() -> None:
    assert Structure.from_json(json.loads(json.dumps(A.to_json()))) == A
    for bad in (None, {}, {"tensors": [["a"]], "config": []}, {"tensors": 1, "config": []}):
        with pytest.raises(CorruptCheckpoint):
            Structure.from_json(bad)


def test_ranks_with_one_model_share_its_hash_and_stages_have_one_over_all() -> None:
    assert combined(["x", "x"]) == "x"
    assert combined(["x", "y"]) != combined(["y", "x"])
