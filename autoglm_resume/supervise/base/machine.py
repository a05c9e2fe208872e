"""This machine: GPUs, ports, disk, and the state of a process."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from autoglm_resume import files, linux
from autoglm_resume.errors import UsageError
from autoglm_resume.supervise.base import nvml

DRIVER_PATIENCE = 30.0
"""Seconds for the GPU driver to answer: it may have to be loaded first."""

EXITING = 0x4
"""PF_EXITING of the kernel, among the flags of a process."""

T = TypeVar("T")


def visible_gpus() -> int:
    """GPUs that a worker would see, without initialising CUDA; 0 where there is no driver."""
    return len(visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES")))


def visible_devices(listed: str | None) -> list[str]:
    """Their names, in CUDA's order, where CUDA_VISIBLE_DEVICES is `listed`."""
    if listed is not None:
        devices = [item.strip() for item in listed.split(",")]
        # CUDA takes the entries before the first invalid one.
        return list(itertools.takewhile(lambda item: item not in ("", "-1"), devices))
    return [str(number) for number in range(_gpus())]


@functools.cache
def _gpus() -> int:
    """How many the driver has, asked once: when one has failed, the driver may be silent or fail,
    and all parts of a run must go on with the same number.
    """
    return within(DRIVER_PATIENCE, nvml.count) or 0


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask` returns, None if it takes longer: it may be stuck in the kernel for ever."""
    answer: list[T] = []
    thread = threading.Thread(target=lambda: answer.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def free_port(fixed: int | None = None) -> int:
    """A TCP port for this attempt's rendezvous: a fresh one, or `fixed` if nobody listens on it.

    Raises UsageError that names who has a fixed port.
    """
    with socket.socket() as probe:
        # As the store itself does, so that connections of a previous attempt do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", fixed or 0))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            found = _owner(fixed or 0) if taken else error.strerror
            raise UsageError(
                f"env.MASTER_PORT: expected port {fixed} to be free, found {found}",
                hint="end that process, choose another port, or leave MASTER_PORT out: autoglm "
                "then takes a free port for every attempt",
            ) from error
        return int(probe.getsockname()[1])


def _owner(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                name = psutil.Process(connection.pid).name()
            except psutil.Error:
                name = "?"
            return f"it in use by process {connection.pid} ({name})"
    return "it in use"


def state(pid: int) -> str:
    """“running”, “sleeping”, “stopped”, “disk-sleep”, …; empty if there is no such process."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return ""


def is_dying(pid: int) -> bool:
    """Whether a process is on its way out, killed or by itself, though it may not be gone yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if stat[0] in "ZX" or int(stat[6]) & EXITING:
            return True
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = 0
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key in ("SigPnd", "ShdPnd"):
            pending |= int(value, 16)
    return bool(pending & 1 << signal.SIGKILL - 1)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all its descendants so far; 0 if it is gone."""
    total = 0.0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in family:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def check_directory(path: Path, free_bytes: int) -> None:
    """Make `path` and prove that files can be written there. Raises UsageError saying why not."""
    try:
        files.prove_writable(path)
    except OSError as error:
        raise UsageError(
            f"checkpoint.dir: {path}: expected a directory that this user can write to, found: "
            f"{error.strerror}",
            hint="choose another checkpoint.dir, or make that one writable",
        ) from error
    free = linux.free_bytes(path)
    if free < free_bytes:
        raise UsageError(
            f"guards.free_disk: {path}: expected at least {free_bytes / 2**30:.2f} GiB free, "
            f"found {free / 2**30:.2f} GiB",
            hint="free some space, or lower guards.free_disk",
        )
