"""The GPUs that ranks would use, as the driver sees them (NVML): no CUDA is initialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autoglm_resume.supervise.base import nvml
from autoglm_resume.supervise.core.checks import GpuFacts, Process
from autoglm_resume.supervise.preflight.leftovers import name_of


def look(
    ours: Callable[[int], bool], listed: str | None
) -> tuple[tuple[GpuFacts, ...] | None, str]:
    """(the GPUs in `listed`, why they could not be asked). `ours` tells processes of this run.

    `listed` is CUDA_VISIBLE_DEVICES as the ranks get it, None where they see every GPU.
    """
    names = None if listed is None else [name.strip() for name in listed.split(",")]
    try:
        with nvml.opened() as library:
            if names is None:
                names = [str(index) for index in range(library.nvmlDeviceGetCount())]
            elif "-1" in names or "" in names:  # CUDA takes those before the first invalid one
                names = names[: min(names.index(end) for end in ("-1", "") if end in names)]
            return tuple(_gpu(library, name, ours) for name in names), ""
    except nvml.missing():
        return ((), "") if not names or names[0] in ("", "-1") else (None, "there is no driver")
    except nvml.error() as error:
        return (GpuFacts("driver", str(error)),), ""


def _gpu(library: Any, name: str, ours: Callable[[int], bool]) -> GpuFacts:
    try:
        if name.isdecimal():
            handle = library.nvmlDeviceGetHandleByIndex(int(name))
        else:
            handle = library.nvmlDeviceGetHandleByUUID(name)
        memory = library.nvmlDeviceGetMemoryInfo(handle)
    except library.NVMLError as error:
        return GpuFacts(f"GPU {name}", str(error))

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except library.NVMLError:  # not every GPU can tell, nor tells everybody
            return None

    errors = ask(lambda handle: nvml.uncorrected(library, handle))
    rows = ask(library.nvmlDeviceGetRemappedRows)
    return GpuFacts(
        f"GPU {name}",
        "",
        int(memory.total),
        int(memory.used),
        errors,
        None if rows is None else bool(rows[3]),
        tuple(
            Process(each.pid, name_of(each.pid), each.usedGpuMemory, ours(each.pid))
            for each in ask(library.nvmlDeviceGetComputeRunningProcesses) or ()
        ),
    )
