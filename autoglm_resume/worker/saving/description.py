"""The state of a module or an optimizer, described once and again only when it is another.

Walking 40,000 tensors by `state_dict()` and naming each takes 1.6 s; finding that they are the same
ones, at the same addresses, takes a fiftieth of that. Only what torch's own `state_dict()` makes
can be known without calling it: where a class or a hook has a say, it is asked every time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, TypeAlias

import torch

from autoglm_resume.checkpoint.format.document import compact
from autoglm_resume.checkpoint.state import tree
from autoglm_resume.checkpoint.state.capture import ObjectState, TensorTable, state_of
from autoglm_resume.checkpoint.state.sharding import is_sharded

_NOTHING: frozenset[int] = frozenset()
_PLAIN = (type(None), bool, int, float, str)


Look: TypeAlias = "Callable[[torch.Tensor], Any]"

# Each takes a tenth of a microsecond, and there may be 100,000 tensors.
_ADDRESS: Look = torch.Tensor.data_ptr
_TRAINS: Look = operator.attrgetter("requires_grad")
_DTYPE: Look = operator.attrgetter("dtype")


@dataclass(frozen=True)
class Parts:
    """All that decides what a description says."""

    objects: list[Any]
    """The same if each is the very same."""
    names: list[Any]
    """The same if they are equal; plain values."""
    looks: Callable[[], Mapping[Look, list[torch.Tensor]]]
    """What of which of the objects must be as it was; the answer is the same for the same parts."""


class Seen:
    """Parts of what was described, and how they looked then."""

    def __init__(self, parts: Parts) -> None:
        """Raises RuntimeError for tensors that are not there yet, as a lazy module's."""
        self._parts = parts
        self._looks = [
            (look, tensors, list(map(look, tensors))) for look, tensors in parts.looks().items()
        ]

    def holds(self, now: Parts | None) -> bool:
        """Whether `now` are the same, and look as they did."""
        before = self._parts
        # One after the other, and nothing kept: 100,000 new objects make the collector run.
        return (
            now is not None
            and len(now.objects) == len(before.objects)
            and all(map(operator.is_, now.objects, before.objects))
            and now.names == before.names
            and all(
                all(map(operator.eq, map(look, tensors), found))
                for look, tensors, found in self._looks
            )
        )


class Description:
    """Of any object with a state_dict."""

    def __init__(self, name: str, obj: Any) -> None:
        self.name = name
        self.obj = obj

    def state(self, trained: Collection[int] = _NOTHING) -> ObjectState:
        """`trained` are the addresses of what optimizers train, the same collection as long as
        they are the same. Raises UsageError naming the path of a value that cannot be saved.
        """
        return state_of(self.name, self.obj.state_dict())


def description_of(name: str, obj: Any) -> Description:
    """The one that knows most of `obj`."""
    if isinstance(obj, torch.nn.Module):
        return ModuleDescription(name, obj)
    if isinstance(obj, torch.optim.Optimizer):
        return OptimizerDescription(name, obj)
    return Description(name, obj)


class ModuleDescription(Description):
    """Of a module; as long as it is the same, so is the table of tensors in its state."""

    def __init__(self, name: str, obj: torch.nn.Module) -> None:
        super().__init__(name, obj)
        self._modules: list[torch.nn.Module] = []
        self._seen: Seen | None = None
        self._trained: Collection[int] = _NOTHING
        self._state: ObjectState | None = None

    def state(self, trained: Collection[int] = _NOTHING) -> ObjectState:
        """See `Description.state`."""
        known = self._seen is not None and self._seen.holds(_module_parts(self._modules))
        if not known or self._trained is not trained:
            found = super().state()
            table = found.table
            until_step = [tensor.data_ptr() in trained for _, tensor in table.tensors]
            self._state = ObjectState(
                found.tree, TensorTable(table.tensors, until_step), found.text
            )
            self._trained = trained
            self._modules = list(self.obj.modules())
            self._seen = _seen(_module_parts(self._modules))
        assert self._state is not None
        return self._state


class OptimizerDescription(Description):
    """Of an optimizer; as long as its tensors are the same, so is the table of them.

    `trained` are the addresses of its parameters, the same set while these are the same.
    """

    def __init__(self, name: str, obj: torch.optim.Optimizer) -> None:
        super().__init__(name, obj)
        self.trained = _NOTHING
        self._seen: Seen | None = None
        self._state: ObjectState | None = None
        self._text = b""
        """Of the state of its parameters, without the settings of groups."""

    def state(self, trained: Collection[int] = _NOTHING) -> ObjectState:
        """See `Description.state`."""
        parts = _optimizer_parts(self.obj)
        if self._state is not None and self._seen is not None and self._seen.holds(parts):
            return self._with_settings(self._state)
        found = super().state()
        # Learning rates are tensors too, now and then, and schedulers change them.
        settings = f"{self.name}/param_groups."
        until_step = [not name.startswith(settings) for name, _ in found.table.tensors]
        self._state = ObjectState(
            found.tree, TensorTable(found.table.tensors, until_step), found.text
        )
        self._seen = _seen(parts)
        self._text = compact(found.tree["state"]) if self._seen else b""
        trained = frozenset(
            tree.local(parameter).data_ptr()
            for group in self.obj.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )
        if trained != self.trained:
            self.trained = trained
        return self._state

    def _with_settings(self, known: ObjectState) -> ObjectState:
        """With the settings of now, such as the learning rate; the rest is as it is known."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.obj.param_groups
        ]
        groups = tree.encode({"param_groups": settings}, self.name)[0]["param_groups"]
        for group, before in zip(groups, known.tree["param_groups"], strict=True):
            group["params"] = before["params"]
        text = (b'{"state":', self._text, b',"param_groups":', compact(groups), b"}")
        return ObjectState({**known.tree, "param_groups": groups}, known.table, text)


def _seen(parts: Parts | None) -> Seen | None:
    """None where nothing can be known."""
    try:
        return Seen(parts) if parts else None
    except RuntimeError:
        return None


# Of thousands of modules, at a speed that no loop of Python's has.
_HOOKS = operator.attrgetter("_state_dict_hooks", "_state_dict_pre_hooks")
_NAMED = operator.attrgetter("_parameters", "_buffers", "_modules")
_HIDDEN = operator.attrgetter("_non_persistent_buffers_set")
_MODE = operator.attrgetter("training")
_VALUES = operator.methodcaller("values")

_ASKED = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""What of a module, or of an optimizer, has a say in its state."""


def _as_torch_has_it(objects: Collection[Any], own: type[Any]) -> bool:
    """Whether neither the classes of `objects` nor they themselves have a say in their states:
    scripts that save adapters put a function of theirs in the place of a module's `state_dict`.
    """
    asked = [name for name in _ASKED if hasattr(own, name)]
    usual = [getattr(own, name) for name in asked]
    if any([getattr(kind, name) for name in asked] != usual for kind in set(map(type, objects))):
        return False
    held = list(map(vars, objects))
    return not any(any(map(operator.contains, held, repeat(name))) for name in asked)


def _module_parts(modules: Collection[torch.nn.Module]) -> Parts | None:
    if not _as_torch_has_it(modules, torch.nn.Module):
        return None
    if any(chain.from_iterable(map(_HOOKS, modules))):
        return None
    named = list(chain.from_iterable(map(_NAMED, modules)))
    hidden = map(tuple, map(sorted, filter(None, map(_HIDDEN, modules))))
    root = next(iter(modules)).training
    modes = map(operator.is_not, map(_MODE, modules), repeat(root))
    names = [*chain.from_iterable(named), *hidden, *modes]
    objects = _with_shards(list(chain.from_iterable(map(_VALUES, named))))

    def looks() -> Mapping[Look, list[torch.Tensor]]:
        tensors = _locals(objects)
        return {_ADDRESS: tensors, _TRAINS: tensors, _DTYPE: tensors, **_layout(tensors)}

    return Parts(objects, names, looks)


def _optimizer_parts(optimizer: torch.optim.Optimizer) -> Parts | None:
    hooks = (
        optimizer._optimizer_state_dict_pre_hooks,
        optimizer._optimizer_state_dict_post_hooks,
    )
    if not _as_torch_has_it([optimizer], torch.optim.Optimizer) or any(hooks):
        return None
    groups = optimizer.param_groups
    states: list[dict[str, Any]] = list(optimizer.state.values())
    held = list(chain.from_iterable(map(_VALUES, states)))
    # What a parameter has that is no tensor must be something that cannot change.
    kinds = set(map(type, held))
    if not all(issubclass(kind, torch.Tensor) or kind in _PLAIN for kind in kinds):
        return None
    parameters = list(chain.from_iterable(group["params"] for group in groups))
    settings = chain.from_iterable(group.values() for group in groups)
    rates = [value for value in settings if isinstance(value, torch.Tensor)]
    names = [
        *chain.from_iterable(states),
        *(len(group["params"]) for group in groups),
        *(tuple(group) for group in groups),
    ]
    objects = _with_shards([*parameters, *optimizer.state, *held, *rates])

    def looks() -> Mapping[Look, list[torch.Tensor]]:
        trained, tensors = _locals(parameters), _locals([*held, *rates])
        return {_ADDRESS: trained + tensors, _TRAINS: trained, **_layout(tensors)}

    return Parts(objects, names, looks)


def _locals(objects: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among `objects`; of those that are sharded, what this rank has."""
    return [tree.local(each) for each in objects if isinstance(each, torch.Tensor)]


def _layout(tensors: list[torch.Tensor]) -> Mapping[Look, list[torch.Tensor]]:
    """What must be looked at to know their sizes and strides: these follow from those, mostly."""
    odd = [tensor for tensor in tensors if not tensor.is_contiguous()]
    look = torch.Tensor
    return {look.size: tensors, look.is_contiguous: tensors, look.stride: odd}


def _with_shards(objects: list[Any]) -> list[Any]:
    """How a DTensor is spread, and the shard that this rank has, are objects of its own."""
    usual = (torch.Tensor, torch.nn.Parameter)
    if not any(issubclass(k, torch.Tensor) and k not in usual for k in set(map(type, objects))):
        return objects
    sharded = [each for each in objects if is_sharded(each)]
    return [*objects, *chain.from_iterable((o._spec, o._local_tensor) for o in sharded)]
