"""What a session needs to know about the objects that a script gives it to track."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.utils.data import DataLoader

from autoglm_resume import files
from autoglm_resume.checkpoint.format.document import digest
from autoglm_resume.checkpoint.format.parameters import Parameters
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.checkpoint.state import capture
from autoglm_resume.errors import UsageError
from autoglm_resume.worker.base import rng
from autoglm_resume.worker.feed.loaders import Follower, deals_data, is_iterated
from autoglm_resume.worker.feed.sampler import ResumableSampler
from autoglm_resume.worker.feed.untracked import Untracked
from autoglm_resume.worker.saving.description import (
    Description,
    OptimizerDescription,
    description_of,
)
from autoglm_resume.worker.state import coverage
from autoglm_resume.worker.state.fitting import Loading
from autoglm_resume.worker.state.parameters import ParameterWatch, has_parameters
from autoglm_resume.worker.state.pending_gradients import GRADIENTS, PendingGradients
from autoglm_resume.worker.state.reshaping import reshaped
from autoglm_resume.worker.state.restoring import RNG
from autoglm_resume.worker.state.within import Trained, unwrapped, within

LARGEST_CONFIG = 1 << 30
"""Bytes of a config file that is part of the model hash."""


PASSES = "passes"
"""Among the generators: what is known of the present passes over loaders, by name."""


class TrackedObjects:
    """What a script gave its session to save and to restore, by name."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.gradients = PendingGradients(self.objects)
        self._descriptions: dict[str, Description] = {}
        self._trained: tuple[tuple[frozenset[int], ...], frozenset[int]] = ((), frozenset())
        self._watch = ParameterWatch(self.objects)
        self._tables: list[capture.TensorTable] = []
        self._began: Structure | None = None
        """Of the modules, as the script makes them."""
        self._parameters: Parameters | None = None
        """Of a state of these tables."""
        self._followers: dict[str, Follower] = {}
        self._watched: dict[int, Trained] = {}
        self._placed = False
        self._untracked: Untracked | None = None

    def add(
        self,
        name: str,
        obj: Any,
        find_place: Callable[[], None],
        where: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        """Raises UsageError for what cannot be tracked.

        What deals data calls `find_place` when it is iterated; for the rest see `Follower`.
        """
        if name in (RNG, GRADIENTS) or name in self.objects:
            raise UsageError(f"session.track({name}=…): that name is taken")
        if not hasattr(obj, "state_dict") or not hasattr(obj, "load_state_dict"):
            raise UsageError(
                f"session.track({name}=…): {type(obj).__name__} has no state_dict() and "
                "load_state_dict()",
                hint="give it an autoglm.ResumableSampler as batch_sampler=, and track that"
                if isinstance(obj, DataLoader)
                else "give it both; they may return and take any plain values and tensors",
            )
        coverage.require_savable(name, obj)
        if isinstance(obj, torch.nn.parallel.DistributedDataParallel):
            never_free(obj)
        self.objects[name] = obj = unwrapped(obj)
        self._descriptions[name] = description_of(name, obj)
        if isinstance(obj, ResumableSampler):
            obj.follow(find_place, say)
        elif is_iterated(obj):
            self._followers[name] = Follower(name, obj, find_place, where, say)

    def begin(self) -> None:
        """Before anything is restored: `parameters` tell what changed since.

        Raises UsageError where an optimizer steps what is not saved.
        """
        coverage.require_parameters(self.objects)
        self._watch = ParameterWatch(self.objects)

    def parameters(self) -> Parameters:
        """What their states, as described last, do not say."""
        return self._parameters or self._watch.parameters()

    def _learn_parameters(self, found: Mapping[str, capture.ObjectState]) -> None:
        """Again if any state is described anew: 40,000 parameters take 30 ms."""
        holders = {name.partition(".")[0] for name in self.within()}
        holders |= {name for name, obj in self.objects.items() if has_parameters(obj)}
        tables = [state.table for name, state in found.items() if name in holders]
        if len(tables) != len(self._tables) or any(
            now is not before for now, before in zip(tables, self._tables, strict=True)
        ):
            self._tables = tables
            modules = {n: found[n] for n, o in self.objects.items() if isinstance(o, Module)}
            others = reshaped(self._began, modules) if self._began is not None else {}
            self._parameters = replace(self._watch.parameters(), reshaped=others)
            self.gradients.changed()

    def unwatched(self) -> list[Trained]:
        """What is within that this did not name before."""
        found = [obj for obj in self.within().values() if id(obj) not in self._watched]
        self._watched.update((id(obj), obj) for obj in found)
        return found

    def within(self) -> dict[str, Trained]:
        """Modules and optimizers that tracked objects hold, by `<object>.<attribute>`."""
        return within({name: obj for name, obj in self.objects.items() if not deals_data(obj)})

    def place(self, loading: Loading) -> None:
        """Load what deals data, once."""
        if self._placed:
            return
        self._placed = True
        loading.into({name: obj for name, obj in self.objects.items() if deals_data(obj)})
        places = loading.states.get(RNG, {}).get(PASSES, {})
        for name, follower in self._followers.items():
            if name in loading.states:
                follower.restored(loading.states[name], places.get(name, {}))

    def load(self, loading: Loading) -> None:
        """Load everything."""
        self.place(loading)
        loading.into({name: obj for name, obj in self.objects.items() if not deals_data(obj)})

    def resumed(self, step: int, say: Callable[[str], None]) -> None:
        """The run goes on at `step`."""
        for sampler in self._samplers:
            sampler.resumed()
        self._untracked = Untracked(step, say)

    def training(self) -> None:
        """It begins. Raises UsageError where that is too late for a loader that has begun."""
        for sampler in self._samplers:
            sampler.training()
        for follower in self._followers.values():
            follower.training()

    def epoch(self) -> int:
        """That the data are in. Raises UsageError where nobody says it."""
        for sampler in self._samplers:
            if not sampler.endless:
                return sampler.epoch
        raise UsageError(
            "session.epochs(): expected a tracked autoglm.ResumableSampler that is not endless: it "
            "knows which epoch it is",
            hint="with another loader, count epochs by hand: "
            "for epoch in range(session.resume() // len(loader), epochs)",
        )

    def step_done(self) -> bool:
        """The position in the data moves on; returns whether an epoch of it has ended.

        Raises UsageError where that cannot be right.
        """
        before = [sampler.epoch for sampler in self._samplers]
        for sampler in self._samplers:
            sampler.step_done()
        for follower in self._followers.values():
            follower.step_done()
        if self._untracked is not None:
            self._untracked.step_done()
        return before != [sampler.epoch for sampler in self._samplers]

    @property
    def _samplers(self) -> list[ResumableSampler]:
        return [obj for obj in self.objects.values() if isinstance(obj, ResumableSampler)]

    @property
    def deals_data(self) -> bool:
        """Whether the position in the data is part of the state."""
        return any(deals_data(obj) for obj in self.objects.values())

    def state(self) -> capture.CapturedState:
        """Of all objects and of the random generators, untouched: it changes when they do."""
        described = self._descriptions.items()
        optimizers = {n: d for n, d in described if isinstance(d, OptimizerDescription)}
        states = {name: each.state() for name, each in optimizers.items()}
        trained = self._all_trained(tuple(each.trained for each in optimizers.values()))
        others = {n: d.state(trained) for n, d in described if n not in optimizers}
        found = {name: (states | others)[name] for name in self.objects}
        followers = self._followers.items()
        places = {name: place for name, follower in followers if (place := follower.place())}
        generators = rng.capture() | ({PASSES: places} if places else {})
        found[RNG] = capture.state_of(RNG, generators)
        self._learn_parameters(found)
        if gradients := self.gradients.state():
            found[GRADIENTS] = capture.state_of(GRADIENTS, gradients)
        return capture.CapturedState(found)

    def _all_trained(self, sets: tuple[frozenset[int], ...]) -> frozenset[int]:
        """The union, the very same one while it is of the same sets."""
        known, union = self._trained
        if len(known) != len(sets) or any(a is not b for a, b in zip(known, sets, strict=True)):
            union = frozenset().union(*sets)
            self._trained = (sets, union)
        return union

    def structure(self, config_files: Iterable[str]) -> Structure | None:
        """Of all modules; None where there is none. Raises UsageError for what has no shape."""
        models = {n: o for n, o in self.objects.items() if isinstance(o, torch.nn.Module)}
        if not models:
            return None
        tensors = {
            f"{name}.{key}": value
            for name, model in models.items()
            for key, value in model.state_dict().items()
        }
        coverage.require_shapes(tensors)
        config = {path: digest(files.read(Path(path), LARGEST_CONFIG)) for path in config_files}
        self._began = capture.structure_of(tensors, config)
        return self._began


def never_free(obj: object) -> None:
    """Let only the end of the process take `obj` away.

    A DistributedDataParallel that is freed after destroy_process_group joins gloo's threads while
    it holds the GIL that one of them may be waiting for: with torch 2.13 under load, ranks that
    were done hung three times in a row.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))
