"""Whether a checkpoint fits what a script tracks, and loading what does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autoglm_resume import output
from autoglm_resume.checkpoint.format import renaming
from autoglm_resume.checkpoint.format.parameters import Group, Parameters, Spec
from autoglm_resume.checkpoint.format.structure import Structure, differences
from autoglm_resume.checkpoint.state.restore import RestoredPart
from autoglm_resume.errors import ModelMismatch, ObjectMismatch
from autoglm_resume.events import PartlyRestored
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.state import data_parallel, optimizers, reshaping
from autoglm_resume.worker.state.grouping import listed
from autoglm_resume.worker.state.optimizers import Regrouping
from autoglm_resume.worker.state.parameters import NamedParameters, named_modules
from autoglm_resume.worker.state.pending_gradients import GRADIENTS
from autoglm_resume.worker.state.restoring import RNG

_ITS_PARAMETERS = (
    "give it the parameters that it had, in the same groups, or set checkpoint.strict: false to go"
    " on without the state of the optimizer"
)


_SETTINGS = ".settings"
_REFUSALS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError)
"""What a `load_state_dict` raises for a state of another object."""


@dataclass(frozen=True)
class Loading:
    """`states` are what the tracked objects of the same names are to load."""

    states: Mapping[str, Any]
    fit: renaming.Fit = field(default_factory=lambda: renaming.Fit((), ()))
    without_state: tuple[str, ...] = ()
    """Optimizers that get their settings (the learning rate) and not the state of parameters."""
    absent: tuple[str, ...] = ()
    """Tracked objects that the checkpoint does not have."""
    regroupings: Mapping[str, Regrouping] = field(default_factory=dict)
    """Of optimizers."""
    named: NamedParameters = field(default_factory=lambda: NamedParameters({}, {}), repr=False)
    strides: Mapping[str, tuple[int, ...]] | None = None
    """Of parameters, when they were saved."""
    trained: Mapping[str, bool] = field(default_factory=dict)
    """Parameters that training unfroze or froze."""
    modes: Mapping[str, bool] = field(default_factory=dict)
    """Whether those modules train whose mode training changed."""
    reshaped: Mapping[str, Spec | None] = field(default_factory=dict)
    """Tensors of modules that training made others."""
    untracked: tuple[str, ...] = ()
    """Objects in the checkpoint that the script does not track."""
    fresh: tuple[str, ...] = ()
    """Objects that the job has start as the script makes them."""
    own_settings: tuple[str, ...] = ()
    """Optimizers whose settings are to be as the script makes them."""

    @property
    def partial(self) -> bool:
        """Whether anything stays as the script made it, or is left behind."""
        return any((self.fit.skipped, self.fit.missing, self.without_state, self.absent))

    def into(self, objects: Mapping[str, Any]) -> None:
        """Load. Raises ObjectMismatch naming an object that would not take its state, and
        ModelMismatch naming tensors that are not what was saved then.
        """
        modules = {name: obj for name, obj in objects.items() if isinstance(obj, torch.nn.Module)}
        reshaping.reshape(self.reshaped, modules)
        parts = named_modules(objects) if self.modes else {}
        for name in self.modes.keys() & parts.keys():
            parts[name].training = self.modes[name]
        for name, trained in self.trained.items():
            if name.partition(".")[0] not in objects:
                continue
            self.named.by_name[name].requires_grad_(trained)
        for name, obj in objects.items():
            if name in self.absent or name in self.fresh:
                continue
            try:
                self._load(name, obj)
            except _REFUSALS as error:
                raise ObjectMismatch(
                    f"{name}: {type(obj).__name__}.load_state_dict() would not take what the"
                    f" checkpoint has: {type(error).__name__}: {error}",
                    hint=f"track the {name} that was tracked before, or start over with --fresh",
                ) from error
        if lines := reshaping.different(self.reshaped, modules):
            raise _made_otherwise("the checkpoint", lines)

    def _load(self, name: str, obj: Any) -> None:
        if name in self.own_settings:
            with optimizers.settings_kept(obj):
                self._load_all(name, obj)
        else:
            self._load_all(name, obj)

    def _load_all(self, name: str, obj: Any) -> None:
        if name in self.without_state:
            optimizers.load_settings(obj, self.states[name])
        elif name in self.regroupings:
            self.regroupings[name].load(obj, self.states[name], self.named)
            optimizers.lay_out(obj, self.named, self.strides)
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

    def remarks(self) -> Iterator[str]:
        """What a person should know though what is tracked has all that it had."""
        if self.untracked:
            yield f"in the checkpoint, and not tracked by this script: {listed(self.untracked)}"
        for name in self.fresh:
            yield f"{name}: starts as the script makes it, not from the checkpoint"
        for name in self.own_settings:
            yield f"{name}: goes on with the settings that the script gives it"
        for name, regrouping in self.regroupings.items():
            if regrouping.moved:
                yield f"{name}: its parameters are in another order now; told by their names"
            for group in regrouping.added:
                yield f"{name}: given the group that training had given it: {_told(group)}"
        for word, trained in (("unfrozen", True), ("frozen", False)):
            names = [name for name, each in self.trained.items() if each is trained]
            if names:
                yield f"{word}, as training had left them: {listed(names)}"


def fitted(
    id: str,
    restored: RestoredPart,
    objects: Mapping[str, Any],
    model: Structure | None,
    settings: Settings,
) -> Loading:
    """What of a checkpoint to load into `objects`, whose modules make up `model`.

    The job's `checkpoint.rename` is applied, unless it fits as it is. Raises ModelMismatch and
    ObjectMismatch if it does not fit, unless the job's `checkpoint.strict` is false.
    """
    strict, rename = settings.checkpoint.strict, settings.checkpoint.rename
    fresh, own_settings = _skipped(id, objects, settings.checkpoint.skip)
    given = {name: state for name, state in restored.states.items() if name not in fresh}
    absent = tuple(name for name in objects if name not in given and name not in fresh)
    if absent and strict:
        raise ObjectMismatch(
            f"{id}: holds {', '.join(sorted(restored.states))}; this script also tracks "
            f"{', '.join(absent)}",
            hint="track the same objects as before, or start over with --fresh",
        )
    theirs, states = restored.part.model, dict(given)
    modules = {n: o for n, o in objects.items() if isinstance(o, torch.nn.Module) and n in states}
    if theirs is None or model is None or theirs.tensors == model.tensors:
        rename = {}
    after = " after checkpoint.rename" if rename else ""
    fit = renaming.Fit((), ())
    if theirs is not None and model is not None:
        if rename:
            theirs = renaming.applied(theirs, rename)
            states.update({name: _renamed(states[name], name, rename) for name in modules})
        found = differences(theirs, model) if settings.check_model and strict else []
        if found:
            raise ModelMismatch(
                f"{id}: model hash: expected {model.hash} (this model), found {theirs.hash} in the "
                f"checkpoint{after}: " + "; ".join(found)
            )
    named = NamedParameters.of(objects)

    def present(name: str) -> str:
        return named.one_name(renaming.renamed(name, rename))

    known = restored.part.parameters.renamed(present) if restored.part.parameters else None
    reshaped = known.reshaped if known else {}
    if lines := reshaping.unfit(reshaped, modules) if strict else ():
        raise _made_otherwise(id, lines)
    if theirs is not None and model is not None and not strict:
        fit = renaming.fit(reshaping.changed(theirs, reshaped), model)
    if strict and (why := optimizers.misplaced(objects, states, known, named)):
        raise ObjectMismatch(f"{id}: {why}", hint=_ITS_PARAMETERS)
    regroupings = optimizers.regroupings(objects, states, known, named)
    unfit = {name: why for name, why in regroupings.items() if isinstance(why, str)}
    if unfit and strict:
        name, why = next(iter(unfit.items()))
        raise ObjectMismatch(f"{id}: {name}: {why}{after}", hint=_ITS_PARAMETERS)
    if not strict:
        for name, module in modules.items():
            states[name] = _fitting(states[name], module.state_dict())
    left_out = tuple(regroupings if fit.skipped or fit.missing else unfit)
    return Loading(
        states,
        fit,
        left_out,
        absent,
        {n: how for n, how in regroupings.items() if isinstance(how, Regrouping)},
        named,
        optimizers.strides_of(restored.part, named, present),
        _trained(known, named) if strict else {},
        known.modes if known else {},
        reshaped if strict else {},
        tuple(n for n in states if n not in objects and n not in (RNG, GRADIENTS)),
        fresh,
        own_settings,
    )


def _skipped(
    id: str, objects: Mapping[str, Any], names: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(objects that are not restored, optimizers that are, but for their settings).

    Raises ObjectMismatch for what is neither.
    """
    fresh, own_settings = [], []
    for name in names:
        holder = name.removesuffix(_SETTINGS)
        if name in objects:
            fresh.append(name)
        elif holder != name and hasattr(objects.get(holder), "param_groups"):
            own_settings.append(holder)
        else:
            raise ObjectMismatch(
                f"{id}: checkpoint.skip: expected objects that the script tracks, which are "
                f"{', '.join(objects)}, found {name!r}",
                hint="of an optimizer, optimizer.settings is its learning rate and the like",
            )
    return tuple(fresh), tuple(name for name in own_settings if name not in fresh)


def _made_otherwise(id: str, lines: Iterable[str]) -> ModelMismatch:
    return ModelMismatch(
        f"{id}: training had made other tensors than this script begins with: {'; '.join(lines)}",
        hint="have the script begin with the model as it is trained, or start over with --fresh",
    )


def _told(group: Group) -> str:
    return listed(map(str, group))


def _trained(known: Parameters | None, named: NamedParameters) -> dict[str, bool]:
    """Which parameters training had unfrozen or frozen that are not so now.

    Raises ObjectMismatch for what cannot be unfrozen any more.
    """
    wanted = dict.fromkeys(known.thawed, True) | dict.fromkeys(known.frozen, False) if known else {}
    found = {
        name: trained
        for name, trained in wanted.items()
        if name in named.by_name and named.by_name[name].requires_grad is not trained
    }
    late = [name for name, trained in found.items() if trained]
    if late and data_parallel.any_has(named.by_name[name] for name in late):
        raise ObjectMismatch(
            f"{listed(late)}: expected to be trained, as at the time of the checkpoint, found"
            " frozen in DistributedDataParallel, which leaves out what was frozen when it was made",
            hint="unfreeze them before DistributedDataParallel is made, or set"
            " checkpoint.strict: false to go on with them frozen",
        )
    return found


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
