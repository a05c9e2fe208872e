"""The state of this machine's GPUs, as their driver tells it (NVML)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from autoglm_resume.supervise.base import nvml
from autoglm_resume.supervise.core.evidence import GpuErrors

DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these is there where a driver is."""


class Gpus:
    """What happens to the GPUs from now on.

    The driver is asked in a thread: its first answer takes up to seconds, and a GPU that is stuck
    gives none. In between it is kept open, so that the second answer is quick.
    """

    def __init__(self) -> None:
        self._before: list[GpuErrors] | None = None
        self._open = contextlib.ExitStack()
        self._library: Any = None
        self._asking: threading.Thread | None = None
        if any(path.exists() for path in DEVICES):
            self._asking = threading.Thread(target=self._begin, daemon=True)
            self._asking.start()

    def since(self) -> tuple[GpuErrors, ...] | None:
        """Their state, and errors since the beginning; None where no driver answers."""
        if self._asking is None:
            return None
        self._asking.join()
        if self._before is None or (now := _read(self._library)) is None:
            return None
        left = {gpu.bus: gpu for gpu in now}
        return tuple(compared(gpu, left.get(gpu.bus)) for gpu in self._before)

    def close(self) -> None:
        """Let go of the driver."""
        if self._asking is not None:
            threading.Thread(target=self._end, args=(self._asking,), daemon=True).start()

    def _begin(self) -> None:
        with contextlib.suppress(nvml.error()):
            self._library = self._open.enter_context(nvml.opened())
            self._before = _read(self._library)

    def _end(self, asking: threading.Thread) -> None:
        asking.join()
        self._open.close()


def compared(before: GpuErrors, now: GpuErrors | None) -> GpuErrors:
    """`now` with the errors since `before`; one that is not there any more is lost."""
    if now is None or now.lost:
        return GpuErrors(before.index, before.bus, lost=True)
    if before.uncorrected is None or now.uncorrected is None:
        return GpuErrors(before.index, before.bus)
    return GpuErrors(
        before.index, before.bus, uncorrected=max(0, now.uncorrected - before.uncorrected)
    )


def _read(library: Any) -> list[GpuErrors] | None:
    """Every GPU, with all its ECC errors since the driver was loaded; None if it does not say."""
    try:
        found = (_gpu(library, index) for index in range(library.nvmlDeviceGetCount()))
        return [gpu for gpu in found if gpu is not None]
    except library.NVMLError:
        return None


def _gpu(library: Any, index: int) -> GpuErrors | None:
    """One GPU, None if it is not there any more."""
    try:
        handle = library.nvmlDeviceGetHandleByIndex(index)
        bus = library.nvmlDeviceGetPciInfo(handle).busId
    except library.NVMLError:
        return None
    bus = bus.decode() if isinstance(bus, bytes) else bus
    try:
        return GpuErrors(index, bus, uncorrected=nvml.uncorrected(library, handle))
    except library.NVMLError_GpuIsLost:
        return GpuErrors(index, bus, lost=True)
