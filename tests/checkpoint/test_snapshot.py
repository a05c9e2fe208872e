from __future__ import annotations

import pytest
import torch

from autoglm_resume.checkpoint import capture
from autoglm_resume.errors import UsageError

ID = "step-0000000003.a0"


def test_a_snapshot_holds_the_bytes_of_every_tensor_under_its_path() -> None:
    state = {"w": torch.arange(4, dtype=torch.int16).reshape(2, 2).T, "n": 3}
    taken = capture.take({"model": state}, id=ID, rank=1, world_size=2, lineage=("x",))
    (tensor,) = taken.tensors
    assert (tensor.name, tensor.dtype, tensor.shape) == ("model/w", "int16", (2, 2))
    assert bytes(tensor.data) == b"\0\0\2\0\1\0\3\0"
    assert taken.trees == {"model": {"w": {"$tensor": "model/w"}, "n": 3}}
    assert (taken.step, taken.nbytes, taken.lineage) == (3, 8, ("x",))
    assert taken.versions["torch"] == str(torch.__version__)


def test_tensors_in_host_memory_are_not_copied() -> None:
    weight = torch.zeros(4)
    taken = capture.take({"m": {"w": weight}}, id=ID, rank=0, world_size=1)
    weight.fill_(1)
    assert bytes(taken.tensors[0].data) == b"\0\0\x80\x3f" * 4


def test_what_cannot_be_saved_is_named_before_anything_is_written() -> None:
    state = {"order": [(x for x in ())]}
    with pytest.raises(UsageError, match=r"sampler/order\.0: a builtins\.generator"):
        capture.take({"sampler": state}, id=ID, rank=0, world_size=1)


def test_the_structure_of_a_module_is_its_parameters_and_buffers() -> None:
    found = capture.structure_of(torch.nn.BatchNorm1d(3).state_dict(), {"a.yaml": "blake3:0"})
    assert found.tensors == (
        ("bias", "float32", (3,)),
        ("num_batches_tracked", "int64", ()),
        ("running_mean", "float32", (3,)),
        ("running_var", "float32", (3,)),
        ("weight", "float32", (3,)),
    )
    assert found.config == (("a.yaml", "blake3:0"),)
