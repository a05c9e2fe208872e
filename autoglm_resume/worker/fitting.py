"""Whether a checkpoint fits what a script tracks, and loading what does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autoglm_resume import output
from autoglm_resume.checkpoint.format import renaming
from autoglm_resume.checkpoint.format.structure import Structure, differences
from autoglm_resume.checkpoint.state.restore import RestoredPart
from autoglm_resume.errors import CheckpointError, ModelMismatch
from autoglm_resume.events import PartlyRestored
from autoglm_resume.worker.base.settings import Settings


@dataclass(frozen=True)
class Loading:
    """`states` are what the tracked objects of the same names are to load."""

    states: Mapping[str, Any]
    fit: renaming.Fit = field(default_factory=lambda: renaming.Fit((), ()))
    without_state: tuple[str, ...] = ()
    """Optimizers that get their settings (the learning rate) and not the state of parameters."""
    absent: tuple[str, ...] = ()
    """Tracked objects that the checkpoint does not have."""

    @property
    def partial(self) -> bool:
        """Whether anything stays as the script made it, or is left behind."""
        return any((self.fit.skipped, self.fit.missing, self.without_state, self.absent))

    def into(self, objects: Mapping[str, Any]) -> None:
        """Load."""
        for name, obj in objects.items():
            if name in self.absent:
                continue
            if name in self.without_state:
                _load_settings(obj, self.states[name])
            elif isinstance(obj, torch.nn.Module) and self.partial:
                obj.load_state_dict(self.states[name], strict=False)
            else:
                obj.load_state_dict(self.states[name])

    def said(self) -> PartlyRestored:
        """For the journal, but for which checkpoint it is."""
        return PartlyRestored(
            skipped=tuple(self.fit.skipped),
            missing=tuple(self.fit.missing),
            without_state=tuple(self.without_state),
            absent=tuple(self.absent),
        )

    def tell(self, id: str) -> None:
        """Say exactly what was not loaded, on standard error."""
        lines = [
            *(f"  in the checkpoint, not loaded: {name}" for name in self.fit.skipped),
            *(f"  not in the checkpoint, as the script made it: {n}" for n in self.fit.missing),
            *(f"  state of its parameters not loaded: {name}" for name in self.without_state),
            *(f"  not in the checkpoint, as the script made it: {n}" for n in self.absent),
        ]
        output.say("\n".join([f"{id}: partly restored", *lines]))


def fitted(
    id: str,
    restored: RestoredPart,
    objects: Mapping[str, Any],
    model: Structure | None,
    settings: Settings,
) -> Loading:
    """What of a checkpoint to load into `objects`, whose modules make up `model`.

    The job's `checkpoint.rename` is applied, unless it fits as it is. Raises ModelMismatch and
    CheckpointError if it does not fit, unless the job's `checkpoint.strict` is false.
    """
    strict, rename = settings.checkpoint.strict, settings.checkpoint.rename
    absent = tuple(name for name in objects if name not in restored.states)
    if absent and strict:
        raise CheckpointError(
            f"{id}: holds {', '.join(sorted(restored.states))}; this script also tracks "
            f"{', '.join(absent)}",
            hint="track the same objects as before, or start over with --fresh",
        )
    theirs = restored.part.model
    if theirs is None or model is None:
        return Loading(restored.states, absent=absent)
    states = dict(restored.states)
    modules = {n: o for n, o in objects.items() if isinstance(o, torch.nn.Module) and n in states}
    if rename and theirs.tensors != model.tensors:
        theirs = renaming.applied(theirs, rename)
        states.update({name: _renamed(states[name], name, rename) for name in modules})
        after = " after checkpoint.rename"
    else:
        after = ""
    if strict:
        found = differences(theirs, model) if settings.check_model else []
        if found:
            raise ModelMismatch(
                f"{id}: model hash: expected {model.hash} (this model), found {theirs.hash} in the "
                f"checkpoint{after}: " + "; ".join(found)
            )
    optimizers = [n for n, obj in objects.items() if hasattr(obj, "param_groups") and n in states]
    # The model hash is over sorted names: it is the same for a model in another order.
    reordered = _reordered(states, modules) if optimizers else ""
    if reordered and strict:
        raise ModelMismatch(
            f"{id}: expected the parameters in the order of the checkpoint, found another one from"
            f" {reordered} on{after}; optimizers know their parameters by number only, and would"
            " give each the moments of another one",
            hint="keep the order in which the model makes its parameters, or set"
            " checkpoint.strict: false to go on without the state of the optimizers",
        )
    if strict:
        return Loading(states)
    fit = renaming.fit(theirs, model)
    for name, module in modules.items():
        states[name] = _fitting(states[name], module.state_dict())
    changed = bool(fit.skipped or fit.missing or reordered)
    return Loading(states, fit, tuple(optimizers) if changed else (), absent)


def _renamed(state: Any, name: str, rename: Mapping[str, str]) -> Any:
    """A module's state dict with the present names."""

    def new(key: str) -> str:
        return renaming.renamed(f"{name}.{key}", rename).removeprefix(f"{name}.")

    found = OrderedDict((new(key), value) for key, value in state.items())
    metadata = getattr(state, "_metadata", {})
    found._metadata = {  # type: ignore[attr-defined]
        new(key) if key else key: value for key, value in metadata.items()
    }
    return found


def _fitting(state: Any, present: Mapping[str, Any]) -> Any:
    """What of a module's state dict has its name and shape in the present one."""
    found = OrderedDict(
        (key, value)
        for key, value in state.items()
        if key in present and _shape(value) == _shape(present[key])
    )
    found._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _reordered(states: Mapping[str, Any], modules: Mapping[str, torch.nn.Module]) -> str:
    """The first parameter of `modules` that is not where it was among its own; empty if none."""
    for name, module in modules.items():
        state = states[name]
        now = [key for key, _ in module.named_parameters(remove_duplicate=False) if key in state]
        there = set(now)
        before = [key for key in state if key in there]
        for ours, theirs in zip(now, before, strict=True):
            if ours != theirs:
                return f"{name}.{ours}"
    return ""


def _load_settings(optimizer: Any, state: Any) -> None:
    """Learning rates and the like, which schedulers go on from."""
    groups = state.get("param_groups", ())
    if len(groups) == len(optimizer.param_groups):
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            kept = {"params", "param_names"}
            group.update({key: value for key, value in saved.items() if key not in kept})
