"""Tensors into a slot: at once, or by a thread beside the training where that is known to be safe.

Beside the training goes what only an optimizer's step changes, in host memory. Whether it changed
meanwhile all the same is told by version counters, which `tensor.data` and NumPy go round, and by
comparing a sample of its bytes: the first, middle and last ones, and some of every 64 KiB.

What is on a device is copied there, at once, into memory that is kept for it; where there is not
enough of that, training waits until it is in the host's.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from autoglm_resume.checkpoint.state.capture import CapturedState, ObjectState, TensorTable
from autoglm_resume.worker.saving.device_staging import DeviceStaging, to_host

Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""A tensor, and where it goes."""
Done: TypeAlias = "Callable[[Exception | None], None]"

MARK = 16
"""Bytes."""
STRIDE = 1 << 16
"""Bytes between two marks in a large tensor."""

_VERSION = operator.attrgetter("_version")
_SOURCE = operator.itemgetter(0)
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Changed(Exception):
    """A tensor was changed while it was copied; the message names it."""


def targets(table: TensorTable, memory: memoryview) -> list[torch.Tensor]:
    """Where each tensor of `table` goes in `memory`: tensors of the same shapes and types."""
    found = []
    for (_, tensor), offset in zip(table.tensors, table.offsets, strict=True):
        if tensor.numel() == 0:
            found.append(torch.empty(tensor.shape, dtype=tensor.dtype))
            continue
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        found.append(flat.view(tensor.shape))
    return found


class DeviceCopier:
    """Makes copies, one after the other, on a thread of its own."""

    def __init__(self) -> None:
        # Thread.start waits until the thread runs, which takes milliseconds on busy processors.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._routes: dict[tuple[str, int], _Route] = {}
        self._staging = DeviceStaging()

    def copy(
        self, state: CapturedState, number: int, slot: memoryview, done: Done, *, at_once: bool
    ) -> DeviceCopy:
        """Copy `state` into slot `number`; with `at_once` nothing is left to the thread.

        `done` is called in the thread, with None or with what made the copy worthless.
        """
        routes = list(self._routes_of(state.objects, number, slot))
        beside = [pair for route in routes for pair in route.beside]
        now = [pair for route in routes for pair in route.now]
        _copy([*now, *beside] if at_once else now)
        staged = self._staging.take([pair for route in routes for pair in route.on_device])
        return DeviceCopy(routes, beside, staged, done, self._thread, at_once=at_once)

    def forget(self) -> None:
        """The slots are given back."""
        self._routes.clear()

    def _routes_of(
        self, objects: Mapping[str, ObjectState], number: int, slot: memoryview
    ) -> Iterable[_Route]:
        """The same ones as ever, as a rule: finding out where tensors lie is what takes time."""
        begin = 0
        for name, state in objects.items():
            route = self._routes.get((name, number))
            if route is None or route.table is not state.table or route.begin != begin:
                route = self._routes[name, number] = _Route(state.table, begin, slot)
            yield route
            begin += state.table.size


class _Route:
    """Which tensors of one object go where in one slot, and how."""

    def __init__(self, table: TensorTable, begin: int, slot: memoryview) -> None:
        self.table = table
        self.begin = begin
        self.now: list[Pair] = []
        self.beside: list[Pair] = []
        self.on_device: list[Pair] = []
        self.names = []
        until_step = itertools.chain(table.until_step, itertools.repeat(False))
        into = targets(table, slot[begin : begin + table.size])
        for (name, source), target, safe in zip(table.tensors, into, until_step, strict=False):
            pair = (source, target)
            if source.device.type != "cpu":
                self.on_device.append(pair)
            elif safe and _plain(source):
                self.beside.append(pair)
                self.names.append(name)
            else:
                self.now.append(pair)
        self.sources = _Marks([source for source, _ in self.beside])
        self.targets = _Marks([target for _, target in self.beside])


class DeviceCopy:
    """One copy, made by a `DeviceCopier`."""

    def __init__(
        self,
        routes: Sequence[_Route],
        beside: Sequence[Pair],
        staged: Sequence[Pair],
        done: Done,
        thread: ThreadPoolExecutor,
        *,
        at_once: bool,
    ) -> None:
        self.held = bool(beside) and not at_once
        """Whether it reads, until it is complete, what a step changes."""
        self._at_once = at_once
        self._routes = routes
        self._pairs = beside
        self._done = done
        if not at_once:
            self._versions = list(map(_VERSION, map(_SOURCE, beside)))
            self._seen = [route.sources.read() for route in routes]
        self._copy_staged = to_host(staged)
        self._thread = thread
        self._finished: Future[None] = Future()

    def start(self) -> None:
        """Copy the rest, beside whatever this thread does."""
        try:
            self._finished = self._thread.submit(self._run)
        except RuntimeError:  # the interpreter is shutting down
            self._run()
            self._finished.set_result(None)

    @property
    def complete(self) -> bool:
        """Whether `done` was called."""
        return self._finished.done()

    def wait(self) -> None:
        """Until the copy is complete and `done` was called."""
        self._finished.result()

    def changed(self) -> str:
        """The name of a tensor that is not what it was, of those that only a step should change.

        Of a copy that was made at once, and is complete; looks at every byte.
        """
        names = (name for route in self._routes for name in route.names)
        for name, (source, target) in zip(names, self._pairs, strict=True):
            if _memcmp(source.data_ptr(), target.data_ptr(), _nbytes(source)):
                return name
        return ""

    def _run(self) -> None:
        try:
            if not self._at_once:
                _copy(self._pairs)
            self._copy_staged()
            if not self._at_once:
                self._require_unchanged()
        except Exception as error:
            self._done(error)
        else:
            self._done(None)

    def _require_unchanged(self) -> None:
        names = [name for route in self._routes for name in route.names]
        for name, (source, _), version in zip(names, self._pairs, self._versions, strict=True):
            if source._version != version:
                raise Changed(name)
        for route, seen in zip(self._routes, self._seen, strict=True):
            for now in (route.sources.read(), route.targets.read()):
                if now != seen:
                    raise Changed(route.names[route.sources.first_difference(seen, now)])


class _Marks:
    """A few bytes of each of some plain tensors.

    Views of memory that others own: good for as long as the tensors are at the same addresses.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        filled = [(index, tensor) for index, tensor in enumerate(tensors) if _nbytes(tensor)]
        found = [(index, view) for index, tensor in filled for view in _views(tensor)]
        self._owners = [(index, len(view)) for index, view in found]
        self._views = [view for _, view in found]
        large = [(index, tensor) for index, tensor in filled if _nbytes(tensor) > STRIDE]
        self._samples = [_sample(tensor) for _, tensor in large]
        counts = [4 * len(sample) for sample in self._samples]
        self._owners += zip((index for index, _ in large), counts, strict=True)
        self._room = torch.empty(sum(counts) // 4, dtype=torch.int32)
        ends = itertools.accumulate(count // 4 for count in counts)
        self._parts = [
            self._room[end - len(sample) : end]
            for end, sample in zip(ends, self._samples, strict=True)
        ]

    def read(self) -> bytes:
        """All of them, as they are now."""
        if self._parts:
            torch._foreach_copy_(self._parts, self._samples)
        return b"".join(self._views) + self._room.numpy().tobytes()

    def first_difference(self, one: bytes, other: bytes) -> int:
        """Index of a tensor that differs."""
        begin = 0
        for index, width in self._owners:
            if one[begin : begin + width] != other[begin : begin + width]:
                return index
            begin += width
        raise ValueError("they are the same")


def _views(tensor: torch.Tensor) -> list[ctypes.Array[ctypes.c_char]]:
    begin, size = tensor.data_ptr(), _nbytes(tensor)
    if size <= 3 * MARK:
        return [(ctypes.c_char * size).from_address(begin)]
    addresses = (begin, begin + (size - MARK) // 2, begin + size - MARK)
    return [(ctypes.c_char * MARK).from_address(address) for address in addresses]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Four bytes of every STRIDE, from within its own bytes."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    whole = flat[: flat.numel() // 4 * 4] if flat.data_ptr() % 4 == 0 else flat[:0]
    return whole.view(torch.int32)[:: STRIDE // 4]


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes in host memory are its values, in order, and a change can be told."""
    special = tensor.is_conj() or tensor.is_neg() or tensor.is_inference()
    return tensor.is_contiguous() and not special


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(pairs: Sequence[Pair]) -> None:
    if pairs:
        # One call for all of them: the interpreter's lock is given up once, not a thousand times.
        sources, into = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(into, sources)


def pin(memory: memoryview, size: int) -> bool:
    """Register host memory with CUDA, so that copies into it need no staging.

    Returns whether that worked; without, copies are only slower.
    """
    return _cudart("cudaHostRegister", _address(memory), size, 0)


def unpin(memory: memoryview) -> None:
    """Undo `pin`, before the memory is given back."""
    _cudart("cudaHostUnregister", _address(memory))


def _address(memory: memoryview) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _cudart(name: str, *arguments: Any) -> bool:
    call = getattr(torch.cuda.cudart(), name)  # type: ignore[no-untyped-call]
    return bool(int(call(*arguments)) == 0)
