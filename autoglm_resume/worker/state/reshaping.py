"""Tensors of modules that training made others: a queue that grows, a model cast to another type.

The script that is started anew has them as it makes them. A buffer can be made what it was; where a
parameter is another, so is more than a state says: what the module computes with it, and what its
optimizer keeps of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from autoglm_resume.checkpoint.format.parameters import Spec
from autoglm_resume.checkpoint.format.structure import Structure, differences
from autoglm_resume.checkpoint.state.capture import ObjectState, structure_of
from autoglm_resume.checkpoint.state.tree import dtype_named


def reshaped(began: Structure, states: Mapping[str, ObjectState]) -> dict[str, Spec | None]:
    """What of the `states` of modules is not what it was when they `began`."""
    before: dict[str, Spec] = {name: (dtype, shape) for name, dtype, shape in began.tensors}
    found: dict[str, Spec | None] = {}
    seen = set()
    for obj, state in states.items():
        rows = {name: (dtype, shape) for name, dtype, shape in state.table.rows}
        for key, leaf in _members(state.tree):
            seen.add(name := f"{obj}.{key}")
            # What a rank has of a sharded one says nothing of the whole.
            tensor = leaf.get("$tensor") if isinstance(leaf, dict) else None
            spec = rows.get(str(tensor)) if tensor else None
            if spec is not None and spec != before.get(name):
                found[name] = spec
    return found | dict.fromkeys(before.keys() - seen)


def _members(tree: Any) -> Iterator[tuple[str, Any]]:
    """Of the tree of a module's state dict."""
    while isinstance(tree, dict) and (inner := tree.get("$module") or tree.get("$shared")):
        tree = inner[0] if "$module" in tree else inner[1]
    if isinstance(tree, dict):
        yield from tree.get("$ordered") or tree.items()


def changed(structure: Structure, wanted: Mapping[str, Spec | None]) -> Structure:
    """With what training made of it."""
    kept = [each for each in structure.tensors if each[0] not in wanted]
    new = [(name, *spec) for name, spec in wanted.items() if spec is not None]
    return Structure.of([*kept, *new], dict(structure.config))


def unfit(wanted: Mapping[str, Spec | None], modules: Mapping[str, Any]) -> list[str]:
    """Lines about what is otherwise in `modules` than is wanted, and cannot be made so."""
    names = {
        name: spec
        for name, spec in wanted.items()
        if (owner := _owner(name, modules)) is None
        or not (_is_buffer(*owner, spec) or _loads_itself(owner[0]))
    }
    return different(names, modules)


def different(wanted: Mapping[str, Spec | None], modules: Mapping[str, Any]) -> list[str]:
    """Lines about what is otherwise in `modules`."""
    wanted = {name: spec for name, spec in wanted.items() if name.partition(".")[0] in modules}
    tensors = {
        f"{name}.{key}": value
        for name in {each.partition(".")[0] for each in wanted}
        for key, value in modules[name].state_dict().items()
        if f"{name}.{key}" in wanted
    }
    mine = structure_of(tensors)
    return differences(changed(Structure(()), wanted), mine)


def reshape(wanted: Mapping[str, Spec | None], modules: Mapping[str, Any]) -> None:
    """Let buffers of `modules` be as large, and of the type, as is wanted."""
    for name, spec in wanted.items():
        if (owner := _owner(name, modules)) is None or not _is_buffer(*owner, spec):
            continue
        module, key = owner
        if spec is None:
            module._buffers[key] = None
            continue
        dtype, shape = dtype_named(spec[0]), spec[1]
        before = getattr(module, key, None)
        if before is not None and (before.dtype, tuple(before.shape)) == (dtype, shape):
            continue
        near = before if before is not None else next(_tensors(modules, name), torch.empty(0))
        empty = torch.empty(shape, dtype=dtype, device=near.device)
        if key in module._buffers:
            module._buffers[key] = empty
        else:
            module.register_buffer(key, empty)


def _owner(name: str, modules: Mapping[str, Any]) -> tuple[torch.nn.Module, str] | None:
    obj, _, path = name.partition(".")
    place, _, key = path.rpartition(".")
    try:
        return modules[obj].get_submodule(place), key
    except (KeyError, AttributeError):
        return None


def _is_buffer(module: torch.nn.Module, key: str, wanted: Spec | None) -> bool:
    if wanted is None or key in module._buffers:
        return key in module._buffers
    return key.isidentifier() and not hasattr(module, key)


def _loads_itself(module: torch.nn.Module) -> bool:
    """As a class of the script's may; those of torch take what is as large as they are."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.")


def _tensors(modules: Mapping[str, Any], name: str) -> Iterator[torch.Tensor]:
    yield from modules[name.partition(".")[0]].parameters()
