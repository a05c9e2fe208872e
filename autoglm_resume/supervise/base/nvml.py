"""NVIDIA's management library (NVML): the only room that opens it. No CUDA is initialised.

Its first answer takes up to seconds, where the driver has to be loaded, and a GPU that is stuck
gives none: whoever must not wait asks in a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """The library (`pynvml`) while it is open. Raises its NVMLError where no driver answers."""
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def error() -> type[Exception]:
    """The class of all its errors."""
    import pynvml

    return pynvml.NVMLError  # type: ignore[no-any-return]


def missing() -> type[Exception]:
    """The class of the error that there is no driver at all."""
    import pynvml

    return pynvml.NVMLError_LibraryNotFound  # type: ignore[no-any-return]


def count() -> int:
    """GPUs that the driver has, 0 without one."""
    with contextlib.suppress(error()), opened() as nvml:
        return int(nvml.nvmlDeviceGetCount())
    return 0


def uncorrected(nvml: Any, handle: Any) -> int | None:
    """ECC errors of a GPU that were not corrected, since its driver was loaded; most have no ECC.

    Raises NVMLError_GpuIsLost.
    """
    try:
        return int(
            nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        )
    except nvml.NVMLError_GpuIsLost:
        raise
    except nvml.NVMLError:
        return None
