"""What a model is made of: names, types and shapes of its tensors, and declared config. Pure.

Two models with the same hash can exchange checkpoints; when the hashes differ, `differences`
says where.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from autoglm_resume.checkpoint.format.document import (
    Json,
    JsonNode,
    canonical,
    columns,
    compact,
    digest,
)

TensorSpec: TypeAlias = "tuple[str, str, tuple[int, ...]]"


@dataclass(frozen=True)
class Structure:
    """Tensors as sorted (name, dtype, shape), config files as sorted (path, digest)."""

    tensors: tuple[TensorSpec, ...]
    config: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, tensors: Iterable[TensorSpec], config: Mapping[str, str] | None = None
    ) -> Structure:
        """Sorted, from tensors in any order and a mapping of config path to digest."""
        return cls(tuple(sorted(tensors)), tuple(sorted((config or {}).items())))

    @cached_property
    def hash(self) -> str:
        """`blake3:…`, the model hash."""
        return digest(canonical(self.to_json()))

    @cached_property
    def text(self) -> bytes:
        """As JSON; made once, because every snapshot says it."""
        return compact(self.to_json())

    def to_json(self) -> Json:
        return {
            "tensors": [[name, dtype, list(shape)] for name, dtype, shape in self.tensors],
            "config": [[path, value] for path, value in self.config],
        }

    @classmethod
    def from_json(cls, document: Json, file: str = "structure") -> Structure:
        """Raises CorruptCheckpoint naming `file` when `document` is not a structure."""
        return cls.from_node(JsonNode(document, file))

    @classmethod
    def from_node(cls, node: JsonNode) -> Structure:
        tensors: list[TensorSpec] = []
        for row in node["tensors"].items():
            name, dtype, shape = columns(row, 3)
            tensors.append((name.text(), dtype.text(), shape.whole_numbers()))
        config: list[tuple[str, str]] = []
        for row in node["config"].items():
            path, value = columns(row, 2)
            config.append((path.text(), value.text()))
        if tensors != sorted(tensors) or config != sorted(config):
            node.fail("sorted tensors and config files")
        return cls(tuple(tensors), tuple(config))


def differences(checkpoint: Structure, model: Structure, limit: int = 4) -> list[str]:
    """Readable lines, at most `limit` and a last one that counts the rest."""
    ours = {name: f"{list(shape)} {dtype}" for name, dtype, shape in model.tensors}
    theirs = {name: f"{list(shape)} {dtype}" for name, dtype, shape in checkpoint.tensors}
    lines = _compare(theirs, ours)
    lines += [f"config {line}" for line in _compare(dict(checkpoint.config), dict(model.config))]
    if len(lines) > limit:
        lines[limit:] = [f"and {len(lines) - limit} more"]
    return lines


def _compare(checkpoint: Mapping[str, str], model: Mapping[str, str]) -> list[str]:
    changed = [
        f"{name}: {found} in the checkpoint, {model[name]} in this model"
        for name, found in checkpoint.items()
        if name in model and model[name] != found
    ]
    gone = [f"only in the checkpoint: {n} {v}" for n, v in checkpoint.items() if n not in model]
    new = [f"only in this model: {n} {v}" for n, v in model.items() if n not in checkpoint]
    return changed + gone + new


def combined(hashes: Sequence[str]) -> str:
    """One model hash for all ranks: the common one, or (pipeline stages) one over the list."""
    if len(set(hashes)) == 1:
        return hashes[0]
    return digest(canonical(list(hashes)))
