"""Whether what is being trained is tracked: what tracked optimizers step, and what can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.optim import Optimizer

from autoglm_resume.errors import UsageError
from autoglm_resume.worker.state.within import modules_of, within

_SHOWN = 3
_DEEPEST = 8


class _Stepped(NamedTuple):
    """A parameter of an optimizer."""

    optimizer: str
    group: int
    number: int
    parameter: torch.Tensor

    def __str__(self) -> str:
        shape = tuple(self.parameter.shape)
        return f"{self.optimizer}, group {self.group}, parameter {self.number} of shape {shape}"


def require_parameters(objects: Mapping[str, Any]) -> None:
    """Raise UsageError if an optimizer among `objects`, or within them, steps a parameter whose
    values none of them saves: it would begin anew at every resume, beside its restored moments.
    """
    optimizers = {n: o for n, o in {**objects, **within(objects)}.items() if _steps(o)}
    known = {id(p) for module in modules_of(objects).values() for p in module.parameters()}
    unknown = [
        _Stepped(name, at, number, parameter)
        for name, optimizer in optimizers.items()
        for at, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
        if id(parameter) not in known and parameter.requires_grad and parameter.numel()
    ]
    if not unknown:
        return
    held = {
        place
        for obj in objects.values()
        if not _steps(obj)
        for tensor in _tensors(obj.state_dict(), _DEEPEST)
        if (place := _storage(tensor)) is not None
    }
    missing = [each for each in unknown if _storage(each.parameter) not in (None, *held)]
    if not missing:
        return
    shown = "; ".join(map(str, missing[:_SHOWN]))
    more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise UsageError(
        f"session.track(): an optimizer steps what nothing tracked holds ({shown}{more}): it would"
        " begin anew at every resume",
        hint="track the module that it belongs to as well, session.track(head=head), or a"
        " parameter of its own in a torch.nn.ParameterDict",
    )


def require_savable(name: str, obj: Any) -> None:
    """Raise UsageError if the state of `obj` cannot be had when a save wants it."""
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(obj).__mro__):
        raise UsageError(
            f"session.track({name}=…): a ZeroRedundancyOptimizer has no state to save before it is"
            " consolidated on one rank, which it would take at every save",
            hint="shard with torch.distributed.fsdp.fully_shard, whose shards are saved where they"
            " are, or use the optimizer within it",
        )


def require_shapes(tensors: Mapping[str, Any]) -> None:
    """Raise UsageError if a tensor of a module, by name, has no shape yet."""
    for name, tensor in tensors.items():
        if isinstance(tensor, UninitializedTensorMixin):
            raise UsageError(
                f"{name} has no shape yet: a lazy module gets it from its first batch",
                hint="run one batch through the model, for example under torch.no_grad(), before"
                " session.resume() or session.steps()",
            )


def _steps(obj: object) -> bool:
    return isinstance(obj, Optimizer)


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner, depth - 1)


def _storage(tensor: torch.Tensor) -> int | None:
    """Where its bytes are; None where that is not to be had."""
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    with suppress(RuntimeError, NotImplementedError):
        return local.untyped_storage().data_ptr() or None
    return None
