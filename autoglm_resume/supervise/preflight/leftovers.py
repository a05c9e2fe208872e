"""Processes that an earlier supervisor of the same run left behind, and ending them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import psutil

from autoglm_resume.protocol.assignment import ASSIGNMENT, RUN

ENDING_SECONDS = 5.0
"""To wait for killed ones; one that is stuck in the kernel cannot be waited for."""


def find(run: Path) -> list[psutil.Process]:
    """Processes of `run` that do not belong to this process. No supervisor may have the run.

    Only what carries the run's own mark in its environment is one of them, whoever else it looks
    like: every process of a run inherits it. Others' processes cannot even be asked.
    """
    here = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = (process for process in psutil.process_iter() if process.pid not in here)
    return [process for process in found if belongs(process.pid, run) and not _below_us(process)]


def belongs(pid: int, run: Path) -> bool:
    """Whether process `pid` carries the mark of `run`, on the same file system."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        marked = any(_names(entry, run) for entry in environment.split(b"\0"))
        # Another container may have a directory of the same name.
        return marked and Path(f"/proc/{pid}/root{run}").samefile(run)
    except OSError:
        return False


def end(processes: list[psutil.Process], run: Path) -> list[psutil.Process]:
    """Kill them; returns those that are still there after a while."""
    waiting: dict[int, psutil.Process] = {}
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                fd = os.pidfd_open(process.pid)
                waiting[fd] = process
                if belongs(process.pid, run):  # the number may be somebody else's by now
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        deadline = time.monotonic() + ENDING_SECONDS
        left = dict(waiting)
        while left and (rest := deadline - time.monotonic()) > 0:
            for fd in select.select([*left], [], [], rest)[0]:
                del left[fd]
        return list(left.values())
    finally:
        for fd in waiting:
            os.close(fd)


def described(process: psutil.Process) -> str:
    """“process 12 (python)”."""
    return f"process {process.pid} ({name_of(process.pid)})"


def name_of(pid: int) -> str:
    """Of its program; “?” if it is gone, or in another container."""
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "?"


def _names(entry: bytes, run: Path) -> bool:
    name, _, value = entry.partition(b"=")
    path = os.fsencode(run)
    return (name == RUN.encode() and value == path) or (
        name == ASSIGNMENT.encode() and value.startswith(path + b"/attempts/")
    )


def _below_us(process: psutil.Process) -> bool:
    try:
        return any(parent.pid == os.getpid() for parent in process.parents())
    except psutil.Error:
        return False
