"""Optimizers that are to go on from a state: with the parameters that they had, wherever they are.

An older checkpoint does not say which those were; then their number and order are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoglm_resume.checkpoint.format.parameters import Group, Parameters
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.state.restore import all_leaves
from autoglm_resume.checkpoint.state.sharding import is_sharded
from autoglm_resume.checkpoint.state.strides import in_c_order
from autoglm_resume.worker.state import grouping
from autoglm_resume.worker.state.grouping import Order
from autoglm_resume.worker.state.parameters import NamedParameters, all_optimizers_of, optimizers_of

_LOOKED_AT = 64
"""Members of a list that are: the states of optimizers are not further behind in one."""


@dataclass(frozen=True)
class Regrouping:
    """`orders` say where the parameters of each group were in the one that was saved.

    `added` are groups that training gave the optimizer, and that a new one does not have.
    """

    orders: Sequence[Order]
    added: Sequence[Group] = ()

    @property
    def moved(self) -> bool:
        """Whether any parameter has another number now."""
        return any(order != tuple(range(len(order))) for order in self.orders)

    def load(self, optimizer: Any, state: Any, named: NamedParameters) -> None:
        """Into an optimizer of these groups.

        Where nothing has moved the state may be of a form that only the optimizer knows.
        """
        saved = state["param_groups"][len(self.orders) :] if self.added else ()
        for group, settings in zip(self.added, saved, strict=False):
            members: list[Any] = [named.by_name[str(member)] for member in group]
            if names := settings.get("param_names"):
                members = list(zip(names, members, strict=True))
            optimizer.add_param_group({"params": members})
        optimizer.load_state_dict(self._renumbered(state) if self.moved else state)

    def _renumbered(self, state: Any) -> Any:
        groups = list(state["param_groups"])
        for nth, order in enumerate(self.orders):
            group = groups[nth]
            lists = {key: group[key] for key in ("params", "param_names") if key in group}
            moved = {key: [values[place] for place in order] for key, values in lists.items()}
            groups[nth] = {**group, **moved}
        return {**state, "param_groups": groups}


def regroupings(
    objects: Mapping[str, Any],
    states: Mapping[str, Any],
    known: Parameters | None,
    named: NamedParameters,
) -> dict[str, Regrouping | str]:
    """For each optimizer of `objects` how its state is to be loaded; or why that cannot be.

    `states` and what is `known` of parameters have present names.
    """
    found: dict[str, Regrouping | str] = {}
    for name, optimizer in optimizers_of(objects):
        if name in states:
            now = named.groups(optimizer)
            saved = known.optimizers.get(name) if known else None
            if known is None or saved is None:
                found[name] = _by_number(states[name], now, objects, states)
            else:
                found[name] = _by_name(saved, now, known.began_with.get(name), named)
    return found


def misplaced(
    objects: Mapping[str, Any],
    states: Mapping[str, Any],
    known: Parameters | None,
    named: NamedParameters,
) -> str:
    """Which optimizer in an object of the script's own would give parameters the state of others,
    because that is by number and these are not where they were; empty if none.
    """
    for name, optimizer in all_optimizers_of(objects):
        saved = known.optimizers.get(name) if known else None
        holder = name.partition(".")[0]
        if saved is None or name in objects or not _numbered(states.get(holder)):
            continue
        now = named.groups(optimizer)
        # With other numbers of them it is for the object to say whether it takes that.
        if saved != now and list(map(len, saved)) == list(map(len, now)):
            lines = grouping.differences(saved, now)
            why = "; ".join(lines) or "its parameters are in another order now"
            return f"{name}: {why}; the state of {holder} knows them by number only"
    return ""


def _numbered(state: Any) -> bool:
    """Whether there is an optimizer's state in it that knows parameters by number."""
    if isinstance(state, Mapping):
        groups = state.get("param_groups")
        if isinstance(groups, list) and groups:
            members = [group.get("params") for group in groups if isinstance(group, Mapping)]
            return any(isinstance(each, int) for some in members for each in some or ())
        return any(map(_numbered, state.values()))
    return isinstance(state, list | tuple) and any(map(_numbered, state[:_LOOKED_AT]))


def _by_name(
    saved: Sequence[Group], now: Sequence[Group], began_with: int | None, named: NamedParameters
) -> Regrouping | str:
    added = saved[len(now) :] if began_with == len(now) else ()
    if any(member not in named.by_name for group in added for member in group):
        added = ()
    orders = grouping.orders(saved[: len(saved) - len(added)], now)
    return (
        "; ".join(grouping.differences(saved, now)) if orders is None else Regrouping(orders, added)
    )


def _by_number(
    state: Any, now: Sequence[Group], objects: Mapping[str, Any], states: Mapping[str, Any]
) -> Regrouping | str:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if groups is not None and not all("params" in group for group in groups):
        groups = None  # of a form that only the optimizer knows
    sizes = [len(group) for group in now]
    if groups is not None and (saved := [len(group["params"]) for group in groups]) != sizes:
        return f"expected groups of {saved} parameters, found groups of {sizes}"
    if other := _reordered(objects, states):
        return (
            f"expected the parameters in the order of the checkpoint, found another one from"
            f" {other} on; it knows them by number only, and would give each the state of another"
        )
    return Regrouping([tuple(range(size)) for size in sizes])


def _reordered(objects: Mapping[str, Any], states: Mapping[str, Any]) -> str:
    """The first parameter of a module that is not where it was among its own; empty if none.

    The model hash is over sorted names: it is the same for a model in another order.
    """
    for name, module in objects.items():
        if not isinstance(module, torch.nn.Module) or name not in states:
            continue
        state = states[name]
        now = [key for key, _ in module.named_parameters(remove_duplicate=False) if key in state]
        there = set(now)
        before = [key for key in state if key in there]
        for ours, theirs in zip(now, before, strict=True):
            if ours != theirs:
                return f"{name}.{ours}"
    return ""


def load_settings(optimizer: Any, state: Any) -> None:
    """Learning rates and the like, which schedulers go on from."""
    groups = state.get("param_groups", ())
    if len(groups) == len(optimizer.param_groups):
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            kept = {"params", "param_names"}
            group.update({key: value for key, value in saved.items() if key not in kept})


@contextmanager
def settings_kept(optimizer: Any) -> Iterator[None]:
    """Whatever state is loaded: the settings of the groups that are there already."""
    kept = {"params", "param_names"}
    own = [
        {key: value for key, value in group.items() if key not in kept}
        for group in optimizer.param_groups
    ]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=False):
        group.update(settings)


def strides_of(
    part: Part, named: NamedParameters, present: Callable[[str], str]
) -> Mapping[str, tuple[int, ...]] | None:
    """How parameters lay in memory when they were saved; None of a checkpoint that does not say.

    `present` gives the present name of what was saved under another.
    """
    if part.parameters is None:
        return None
    found = {}
    for leaf, members in all_leaves(part).items():
        name = present(leaf.replace("/", ".", 1))
        if (parameter := named.by_name.get(name)) is not None:
            found[name] = tuple(members.get("strides") or in_c_order(parameter.shape))
    return found


def lay_out(
    optimizer: Any, named: NamedParameters, before: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Have the state of parameters lie in memory as these do, if they did not lie so `before`.

    Fused optimizers walk through a parameter and its state in the order of memory, whatever the
    order of either.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor) or is_sharded(parameter):
            continue
        present = parameter.stride()
        if before is not None:
            name = named.names.get(id(parameter), "")
            if before.get(name, present) == present:
                continue
        strides = torch.empty_like(parameter).stride()
        for key, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and not is_sharded(value)
                and value.shape == parameter.shape
                and value.stride() != strides
            ):
                empty = torch.empty_strided(
                    value.shape, strides, dtype=value.dtype, device=value.device
                )
                state[key] = empty.copy_(value)
