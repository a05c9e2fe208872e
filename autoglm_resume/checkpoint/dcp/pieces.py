"""The pieces that all ranks have stored of tensors, without DCP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoglm_resume.checkpoint.dcp.boxes import pieces_of
from autoglm_resume.checkpoint.dcp.metadata import from_json
from autoglm_resume.checkpoint.dcp.paths import METADATA
from autoglm_resume.checkpoint.format.part import Part, part_file
from autoglm_resume.checkpoint.format.tables import Tensor


@dataclass(frozen=True)
class Piece:
    """`tensor` of a part begins at `offset` of the tensor `fqn`, which has `shape`."""

    fqn: str
    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def of(parts: Sequence[Part]) -> Iterator[tuple[Part, Piece]]:
    """Of all `parts` of a checkpoint that was saved through DCP. Raises CorruptCheckpoint."""
    home = next(part for part in parts if METADATA in part.objects)
    file = f"{home.id}/{part_file(home.rank)}"
    entries = from_json(home.state[METADATA], file).state_dict_metadata
    for part in parts:
        for (fqn, offset), tensor in pieces_of(part).items():
            shape = tuple(getattr(entries.get(fqn), "size", tensor.shape))
            yield part, Piece(fqn, tensor, shape, (0,) * len(shape) if offset is None else offset)
