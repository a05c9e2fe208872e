"""The state of this machine's GPUs, as their driver tells it (NVML)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from autoglm_resume.supervise.core.evidence import Gpu

DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these is there where a driver is."""


class Gpus:
    """What happens to the GPUs from now on.

    The driver is asked in a thread: its first answer takes up to seconds, and a GPU that is stuck
    gives none. In between it is kept open, so that the second answer is quick.
    """

    def __init__(self) -> None:
        self._before: list[Gpu] | None = None
        self._asking: threading.Thread | None = None
        if any(path.exists() for path in DEVICES):
            self._asking = threading.Thread(target=self._begin, daemon=True)
            self._asking.start()

    def since(self) -> tuple[Gpu, ...] | None:
        """Their state, and errors since the beginning; None where no driver answers."""
        if self._asking is None:
            return None
        self._asking.join()
        if self._before is None or (now := _read()) is None:
            return None
        left = {gpu.bus: gpu for gpu in now}
        return tuple(compared(gpu, left.get(gpu.bus)) for gpu in self._before)

    def close(self) -> None:
        """Let go of the driver."""
        if self._asking is not None:
            threading.Thread(target=self._end, args=(self._asking,), daemon=True).start()

    def _begin(self) -> None:
        import pynvml  # type: ignore[import-untyped]

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._before = _read()

    def _end(self, asking: threading.Thread) -> None:
        import pynvml

        asking.join()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def compared(before: Gpu, now: Gpu | None) -> Gpu:
    """`now` with the errors since `before`; one that is not there any more is lost."""
    if now is None or now.lost:
        return Gpu(before.index, before.bus, lost=True)
    if before.uncorrected is None or now.uncorrected is None:
        return Gpu(before.index, before.bus)
    return Gpu(before.index, before.bus, uncorrected=max(0, now.uncorrected - before.uncorrected))


def _read() -> list[Gpu] | None:
    """Every GPU, with all its ECC errors since the driver was loaded; None without a driver."""
    import pynvml

    try:
        found = (_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return [gpu for gpu in found if gpu is not None]
    except pynvml.NVMLError:
        return None


def _gpu(nvml: Any, index: int) -> Gpu | None:
    """One GPU, None if it is not there any more."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        bus = nvml.nvmlDeviceGetPciInfo(handle).busId
    except nvml.NVMLError:
        return None
    bus = bus.decode() if isinstance(bus, bytes) else bus
    try:
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    except nvml.NVMLError_GpuIsLost:
        return Gpu(index, bus, lost=True)
    except nvml.NVMLError:
        return Gpu(index, bus)  # most have no ECC
    return Gpu(index, bus, uncorrected=int(errors))
