"""The parameters of what a script tracks, by name: whose they are, and what training made of them.

Scripts freeze and unfreeze layers, and give optimizers more groups, at some step of the training.
No state dict says so, and a script that is started anew has passed that step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoglm_resume.checkpoint.format.parameters import Group, Member, Parameters
from autoglm_resume.worker.state.within import modules_of, within


@dataclass(frozen=True)
class NamedParameters:
    """Those of all modules tracked and within, as `<object>.<name in the module>`."""

    by_name: Mapping[str, torch.nn.Parameter]
    names: Mapping[int, str]
    """One name for each, by `id`: the first in the alphabet, whatever the order of modules, of
    those in modules that are tracked themselves."""

    @classmethod
    def of(cls, objects: Mapping[str, Any]) -> NamedParameters:
        found = {
            f"{name}.{key}": parameter
            for name, obj in modules_of(objects).items()
            for key, parameter in obj.named_parameters(remove_duplicate=False)
        }
        inner = within(objects)

        def last(name: str) -> tuple[bool, str]:
            return any(name.startswith(f"{each}.") for each in inner), name

        return cls(found, {id(found[name]): name for name in sorted(found, key=last, reverse=True)})

    def one_name(self, name: str) -> str:
        """The one name of the parameter that is called `name` too."""
        found = self.by_name.get(name)
        return name if found is None else self.names[id(found)]

    def groups(self, optimizer: Any) -> tuple[Group, ...]:
        """Of an optimizer, in order."""
        return tuple(tuple(self._members(group)) for group in optimizer.param_groups)

    def _members(self, group: Mapping[str, Any]) -> Iterator[Member]:
        # What optimizers are told that are made of named parameters.
        told = group.get("param_names") or ()
        for nth, parameter in enumerate(group["params"]):
            name = self.names.get(id(parameter)) or (told[nth] if nth < len(told) else None)
            yield name or tuple(parameter.shape)


class ParameterWatch:
    """What changed since a script began to train, or to go on."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self._trained = _trained(NamedParameters.of(objects))
        self._counts = {name: len(obj.param_groups) for name, obj in optimizers_of(objects)}
        self._modes = _modes(objects)

    def parameters(self) -> Parameters:
        """As they are now; for a checkpoint."""
        named = NamedParameters.of(self._objects)
        groups = {name: named.groups(obj) for name, obj in all_optimizers_of(self._objects)}
        trained = _trained(named)
        changed = [name for name, now in trained.items() if self._trained.get(name, now) is not now]
        return Parameters(
            groups,
            {n: began for n, began in self._counts.items() if len(groups[n]) > began},
            modes=self._changed_modes(),
            thawed=tuple(sorted(name for name in changed if trained[name])),
            frozen=tuple(sorted(name for name in changed if not trained[name])),
            buffers=tuple(name.replace("/", ".", 1) for name in buffers_of(self._objects)),
        )

    def _changed_modes(self) -> dict[str, bool]:
        """An evaluation in between changes the modes of all, and is no change."""
        now, usual = _modes(self._objects), (True, True)
        return {
            name: mode
            for name, (mode, with_root) in now.items()
            if self._modes.get(name, usual)[1] is not with_root
        }


def all_optimizers_of(objects: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """And those in objects that have no groups themselves, by `<object>.<attribute>`."""
    found = optimizers_of(objects)
    named = {name for name, _ in found}
    inner = optimizers_of(within(objects))
    return found + [each for each in inner if each[0].partition(".")[0] not in named]


def named_modules(objects: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """All that modules tracked and within are made of, as `<object>.<name in the module>`."""
    return {
        f"{name}.{key}": module
        for name, root in modules_of(objects).items()
        for key, module in root.named_modules()
        if key
    }


def _modes(objects: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
    """Whether each module in a module trains, and whether that is its root's mode."""
    return {
        f"{name}.{key}": (module.training, module.training is root.training)
        for name, root in modules_of(objects).items()
        for key, module in root.named_modules()
        if key
    }


def optimizers_of(objects: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Objects that have groups of parameters, by name."""
    return [(name, obj) for name, obj in objects.items() if hasattr(obj, "param_groups")]


def has_parameters(obj: Any) -> bool:
    """Whether it is a module or has groups of parameters."""
    return isinstance(obj, torch.nn.Module) or hasattr(obj, "param_groups")


def buffers_of(objects: Mapping[str, Any]) -> list[str]:
    """As a state names them, `<object>/<name in the module>`, of modules that have parameters.

    Where ranks have the same parameters, a module is one model's: what DistributedDataParallel
    makes alike before every forward pass, and others only when they save it, is rank 0's.
    """
    return [
        f"{name}/{key}"
        for name, obj in objects.items()
        if isinstance(obj, torch.nn.Module) and any(True for _ in obj.parameters())
        for key, _ in obj.named_buffers()
    ]


def _trained(named: NamedParameters) -> dict[str, bool]:
    """Which of them are."""
    return {name: named.by_name[name].requires_grad for name in named.names.values()}
