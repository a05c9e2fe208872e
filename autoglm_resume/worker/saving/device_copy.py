"""Tensors into a slot: what may change soon at once, the rest by a thread beside the training.

Whether a tensor changed meanwhile is told by its version counter, which `tensor.data` goes round,
and by comparing a few of its bytes before and after.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from autoglm_resume.checkpoint.format.snapshot import layout
from autoglm_resume.checkpoint.state import tree

Pair: TypeAlias = "tuple[tuple[str, torch.Tensor], torch.Tensor]"
"""A tensor with its name, and where it goes."""

MARK = 16
"""Bytes."""
SLOTS = 2
"""That snapshots alternate between, at most."""


class Changed(Exception):
    """A tensor was changed while it was copied; the message names it."""


def targets(tensors: Sequence[tuple[str, torch.Tensor]], slot: memoryview) -> list[torch.Tensor]:
    """Where each of `tensors` goes in `slot`: tensors of the same shapes and types."""
    offsets, _ = layout(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    found = []
    for (_, tensor), offset in zip(tensors, offsets, strict=True):
        if tensor.numel() == 0:
            found.append(torch.empty(tensor.shape, dtype=tensor.dtype))
            continue
        flat = torch.frombuffer(slot, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        found.append(flat.view(tensor.shape))
    return found


def safe_until_step(optimizers: Sequence[torch.optim.Optimizer]) -> frozenset[int]:
    """Data pointers of what only a step of these optimizers changes: their parameters and state."""
    found: set[int] = set()
    for optimizer in optimizers:
        if any(group.get("capturable") for group in optimizer.param_groups):
            continue  # a step that is replayed from a CUDA graph passes no hook
        for group in optimizer.param_groups:
            trained = (p for p in group["params"] if p.requires_grad)
            found.update(tree.local(parameter).data_ptr() for parameter in trained)
        for state in optimizer.state.values():
            values = state.values() if isinstance(state, dict) else ()
            found.update(tree.local(v).data_ptr() for v in values if isinstance(v, torch.Tensor))
    return frozenset(found - {0})


class DeviceCopier:
    """Makes copies, one after the other, on a thread of its own."""

    def __init__(self) -> None:
        # Thread.start waits until the thread runs, which takes milliseconds on busy processors.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._marks: dict[tuple[object, ...], _Marks] = {}

    def copy(
        self,
        tensors: Sequence[tuple[str, torch.Tensor]],
        into: Sequence[torch.Tensor],
        safe: frozenset[int],
        done: Callable[[Exception | None], None],
    ) -> DeviceCopy:
        """Copy what is not safe, now; the rest once the copy returned is started.

        `done` is called in the thread, with None or with what made the copy worthless.
        """
        pairs = list(zip(tensors, into, strict=True))
        later = [pair for pair in pairs if _safe(pair[0][1], safe)]
        chosen = {id(target) for _, target in later}
        _copy([(source, target) for (_, source), target in pairs if id(target) not in chosen])
        return DeviceCopy(later, self._marked(later), done, self._thread)

    def _marked(self, pairs: Sequence[Pair]) -> _Marks:
        """Of the same tensors as ever, as a rule: finding out where they lie is what takes time."""
        addresses = tuple(
            (source.data_ptr(), target.data_ptr(), _nbytes(source), _plain(source))
            for (_, source), target in pairs
        )
        if addresses not in self._marks:
            if len(self._marks) >= 2 * SLOTS:
                self._marks.clear()
            self._marks[addresses] = _Marks(pairs)
        return self._marks[addresses]


class DeviceCopy:
    """One copy, made by a `DeviceCopier`; `start` lets the thread copy what is left."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        marks: _Marks,
        done: Callable[[Exception | None], None],
        thread: Executor,
    ) -> None:
        self._pairs = pairs
        self._versions = [source._version for (_, source), _ in pairs]
        self._marks = marks
        self._seen = marks.of_sources()
        self._done = done
        self._thread = thread
        self._starting = threading.Lock()
        self._finished: Future[None] | None = None

    def start(self) -> None:
        """Copy the rest, beside whatever this thread does."""
        with self._starting:  # hooks may be called from several threads
            if self._finished is None:
                # After whatever is queued on the device by now, such as weights swapped back.
                self._streams = _Streams(source for (_, source), _ in self._pairs)
                try:
                    self._finished = self._thread.submit(self._run)
                except RuntimeError:  # the interpreter is shutting down
                    self._finished = Future()
                    self._run()
                    self._finished.set_result(None)

    def wait(self) -> None:
        """Until the copy is complete and `done` was called."""
        self.start()
        assert self._finished is not None
        self._finished.result()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._streams.copy([(source, target) for (_, source), target in self._pairs])
            self._require_unchanged()
        except Exception as error:
            self._done(error)
        else:
            self._done(None)

    def _require_unchanged(self) -> None:
        for ((name, source), _), version in zip(self._pairs, self._versions, strict=True):
            if source._version != version:
                raise Changed(name)
        for now in (self._marks.of_sources(), self._marks.of_targets()):
            if now != self._seen:
                raise Changed(self._marks.first_difference(self._seen, now))


class _Marks:
    """A few bytes of each tensor in host memory, its first, middle and last, all of them at once.

    Views of memory that others own: good for as long as the tensors are at the same addresses.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        looked_at = [(name, s, t) for (name, s), t in pairs if _plain(s) and _nbytes(s)]
        self._names = [name for name, _, _ in looked_at]
        self._widths = [min(MARK, _nbytes(source)) for _, source, _ in looked_at]
        self._sources = [view for _, source, _ in looked_at for view in _views(source)]
        self._targets = [view for _, _, target in looked_at for view in _views(target)]

    def of_sources(self) -> bytes:
        return b"".join(self._sources)

    def of_targets(self) -> bytes:
        return b"".join(self._targets)

    def first_difference(self, one: bytes, other: bytes) -> str:
        """Name of a tensor that differs."""
        begin = 0
        for name, width in zip(self._names, self._widths, strict=True):
            end = begin + 3 * width
            if one[begin:end] != other[begin:end]:
                return name
            begin = end
        raise ValueError("they are the same")


def _views(tensor: torch.Tensor) -> list[ctypes.Array[ctypes.c_char]]:
    begin, size = tensor.data_ptr(), _nbytes(tensor)
    width = min(MARK, size)
    addresses = (begin, begin + (size - width) // 2, begin + size - width)
    return [(ctypes.c_char * width).from_address(address) for address in addresses]


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes in host memory are its values, in order."""
    host = tensor.device.type == "cpu"
    return host and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _safe(tensor: torch.Tensor, safe: frozenset[int]) -> bool:
    # In host memory a look at its bytes must tell whether it was changed.
    seen = tensor.device.type != "cpu" or _plain(tensor)
    return seen and tensor.data_ptr() in safe and not tensor.is_inference()


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if pairs:
        # One call for all of them: the interpreter's lock is given up once, not a thousand times.
        sources, into = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(into, sources)


class _Streams:
    """Copies device tensors on a stream of their own, after what is queued at construction."""

    def __init__(self, sources: Any) -> None:
        devices = {source.device for source in sources if source.device.type == "cuda"}
        self._events = {d: torch.cuda.current_stream(d).record_event() for d in devices}

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Until every byte is in host memory."""
        finished = []
        for device, event in self._events.items():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                for source, target in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                finished.append(stream.record_event())
        _copy([pair for pair in pairs if pair[0].device not in self._events])
        for event in finished:
            event.synchronize()


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


def _cudart(name: str, *arguments: int) -> bool:
    call = getattr(torch.cuda.cudart(), name)  # type: ignore[no-untyped-call]
    return bool(int(call(*arguments)) == 0)
