"""Tensors on a device, copied there at once, so that training can go on while they travel.

A copy within a device takes a hundredth of what one to the host does, and is queued behind the
step like any other work: whatever changes a tensor afterwards (a step that is replayed from a CUDA
graph passes no hook and moves no version counter) cannot reach the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"

RESERVE = 2 << 30
"""Bytes of a device that are left free: what training takes at its peak is known after the first
step, but an evaluation or a longer batch may come."""


class DeviceStaging:
    """Memory on devices that is kept for copies of the same tensors."""

    def __init__(self) -> None:
        self._shapes: list[tuple[object, ...]] = []
        self._memory: list[torch.Tensor] | None = None

    def take(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Copies of the sources, each with its target; training may go on at once.

        Where a device has no room for them, the sources are copied to their targets before this
        returns, and there is nothing left to do.
        """
        if not pairs:
            return []
        sources = [source for source, _ in pairs]
        memory = self._memory_like(sources)
        if memory is None:
            to_host(pairs)()
            return []
        with torch.no_grad():
            torch._foreach_copy_(memory, sources)
        return [(copy, target) for copy, (_, target) in zip(memory, pairs, strict=True)]

    def _memory_like(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Made once for as long as shapes stay; None without room, which is not asked for again."""
        shapes: list[tuple[object, ...]] = [
            (s.device, s.dtype, s.shape, s.stride()) for s in sources
        ]
        if shapes != self._shapes:
            self._shapes = shapes
            self._memory = None
            if _fits(sources):
                try:
                    self._memory = [torch.empty_like(source) for source in sources]
                except torch.OutOfMemoryError:
                    self._memory = None
        return self._memory


def _fits(sources: Sequence[torch.Tensor]) -> bool:
    needed: dict[torch.device, int] = {}
    for source in sources:
        size = source.numel() * source.element_size()
        needed[source.device] = needed.get(source.device, 0) + size
    return all(
        device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= size + RESERVE
        for device, size in needed.items()
    )


def to_host(pairs: Sequence[Pair]) -> Callable[[], None]:
    """A function that copies every source, as it is after what is queued on its device by now, and
    returns when every byte is in host memory. It may be called in another thread.
    """
    cuda = {source.device for source, _ in pairs if source.device.type == "cuda"}
    events = {device: torch.cuda.current_stream(device).record_event() for device in cuda}

    def copy() -> None:
        finished = []
        for device, event in events.items():
            # Whatever makes a context must make it on this device, and not on the first.
            with torch.cuda.device(device):
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_event(event)
                with torch.cuda.stream(stream), torch.no_grad():
                    for source, target in pairs:
                        if source.device == device:
                            target.copy_(source, non_blocking=True)
                    finished.append(stream.record_event())
        with torch.no_grad():
            for source, target in pairs:
                if source.device not in events:
                    target.copy_(source)
        for event in finished:
            event.synchronize()

    return copy
