"""Tensors into a slot: what may change soon at once, the rest by a thread beside the training.

Whether a tensor changed meanwhile is told by its version counter, which `tensor.data` goes round,
and by a look at a few of its bytes before and after.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autoglm_resume.checkpoint import tree
from autoglm_resume.checkpoint.snapshot import layout


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
        for group in optimizer.param_groups:
            trained = (p for p in group["params"] if p.requires_grad)
            found.update(tree.local(parameter).data_ptr() for parameter in trained)
        for state in optimizer.state.values():
            values = state.values() if isinstance(state, dict) else ()
            found.update(tree.local(v).data_ptr() for v in values if isinstance(v, torch.Tensor))
    return frozenset(found - {0})


class Copy:
    """One copy. Construction copies all that is not safe; `start` lets a thread copy the rest."""

    def __init__(
        self,
        tensors: Sequence[tuple[str, torch.Tensor]],
        into: Sequence[torch.Tensor],
        safe: frozenset[int],
        done: Callable[[Exception | None], None],
    ) -> None:
        """`done` is called in the thread, with None or with what made the copy worthless."""
        self._done = done
        pairs = list(zip(tensors, into, strict=True))
        self._later = [pair for pair in pairs if _safe(pair[0][1], safe)]
        self._versions = [source._version for (_, source), _ in self._later]
        self._marks = [_mark(source) for (_, source), _ in self._later]
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        chosen = {id(target) for _, target in self._later}
        _copy([(s, t) for (_, s), t in pairs if id(t) not in chosen])

    def start(self) -> None:
        """Copy the rest, beside whatever this thread does."""
        with self._starting:  # hooks may be called from several threads
            if self._thread is None:
                # After whatever is queued on the device by now, such as weights swapped back.
                self._streams = _Streams(source for (_, source), _ in self._later)
                thread = threading.Thread(target=self._run, name="snapshot")
                thread.start()
                self._thread = thread

    def wait(self) -> None:
        """Until the copy is complete and `done` was called."""
        self.start()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._streams.copy([(source, target) for (_, source), target in self._later])
            self._require_unchanged()
        except Exception as error:
            self._done(error)
        else:
            self._done(None)

    def _require_unchanged(self) -> None:
        for ((name, source), target), version, mark in zip(
            self._later, self._versions, self._marks, strict=True
        ):
            if source._version != version or (mark and not mark == _mark(source) == _mark(target)):
                raise Changed(name)


def _mark(tensor: torch.Tensor) -> tuple[bytes, ...]:
    """A few bytes of a tensor in host memory: its first, middle and last."""
    size = tensor.numel() * tensor.element_size()
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if tensor.device.type != "cpu" or not plain or not size:
        return ()
    begin, width = tensor.data_ptr(), min(16, size)
    places = (begin, begin + (size - width) // 2, begin + size - width)
    return tuple(ctypes.string_at(place, width) for place in places)


def _safe(tensor: torch.Tensor, safe: frozenset[int]) -> bool:
    return tensor.data_ptr() in safe and not tensor.is_inference()


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


def pin(memory: memoryview, size: int) -> None:
    """Register host memory with CUDA, so that copies into it need no staging. Best effort."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.cudart().cudaHostRegister(address, size, 0)  # type: ignore[no-untyped-call]
