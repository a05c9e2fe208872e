"""Names that parameters had in older checkpoints, and what of those fits a changed model. Pure.

A name is that of a parameter or of a module with all that is in it, as the model's state dict has
it (`layers.0.weight`, `layers`), or with the name it is tracked under in front
(`model.layers.0.weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autoglm_resume.checkpoint.format.structure import Structure


def renamed(name: str, rename: Mapping[str, str]) -> str:
    """The present name of `name`, which begins with that of the tracked object."""
    tracked, _, key = name.partition(".")
    for prefix, rest in _prefixes(name):
        if prefix in rename and prefix != tracked:
            return rename[prefix] + rest
    for prefix, rest in _prefixes(key):
        if prefix in rename:
            return f"{tracked}.{rename[prefix]}{rest}"
    return name


def applied(structure: Structure, rename: Mapping[str, str]) -> Structure:
    """`structure` with the present names."""
    tensors = ((renamed(name, rename), dtype, shape) for name, dtype, shape in structure.tensors)
    return Structure.of(tensors, dict(structure.config))


@dataclass(frozen=True)
class Fit:
    """`skipped` is in the checkpoint and not loaded; `missing` is in the model and not loaded.

    Names with shapes, sorted.
    """

    skipped: tuple[str, ...]
    missing: tuple[str, ...]


def fit(checkpoint: Structure, model: Structure) -> Fit:
    """What is left over on both sides where tensors of the same name and shape are loaded."""
    theirs = {(name, shape) for name, _, shape in checkpoint.tensors}
    ours = {(name, shape) for name, _, shape in model.tensors}
    return Fit(_lines(theirs - ours), _lines(ours - theirs))


def _lines(tensors: set[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    return tuple(f"{name} {list(shape)}" for name, shape in sorted(tensors))


def _prefixes(name: str) -> Iterator[tuple[str, str]]:
    """`a.b.c` and what is left, then `a.b` and `.c`, then `a` and `.b.c`."""
    end = len(name)
    while end > 0:
        yield name[:end], name[end:]
        end = name.rfind(".", 0, end)
