"""The software and limits of this machine, for `autoglm doctor`. torch is asked in a child."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from autoglm_resume import linux
from autoglm_resume.supervise.core.checks import System

TORCH_SECONDS = 120.0
_TORCH = """
import json, torch
found = {"torch": torch.__version__}
if torch.version.cuda:
    found["CUDA"] = torch.version.cuda
if torch.version.hip:
    found["ROCm"] = torch.version.hip
if torch.cuda.is_available():
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
elif torch.version.cuda:
    found["GPUs"] = "none usable"
print(json.dumps(found))
"""
_V2 = {"memory": "memory.max", "process": "pids.max", "cpu": "cpu.max"}
_V1 = {
    "memory": "memory/memory.limit_in_bytes",
    "process": "pids/pids.max",
    "cpu": "cpu/cpu.cfs_quota_us",
}
_UNLIMITED = 1 << 60


def look(environment: Mapping[str, str]) -> System:
    """Ask; importing torch takes seconds."""
    return System(
        python=f"{platform.python_version()} ({sys.executable})",
        versions=_versions(environment),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        limits=_limits(),
        features={name: _why_not(try_it) for name, try_it in _FEATURES.items()},
    )


def _versions(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TORCH_SECONDS,
            check=True,
        )
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"importing it took longer than {TORCH_SECONDS:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"python ended with {error.returncode}"}
    except (ValueError, IndexError):
        return {"error": "importing it printed something else"}
    return found


def _limits() -> dict[str, str]:
    group = Path("/sys/fs/cgroup")
    try:
        line = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1]
        own = group / line.split(":", 2)[2].lstrip("/")
    except (OSError, IndexError):
        own = group
    found = {}
    for name in _V2:
        for path in (own / _V2[name], group / _V2[name], group / _V1[name]):
            try:
                found[name] = _readable(name, path.read_text().strip())
                break
            except OSError:
                continue
    return found


def _readable(name: str, text: str) -> str:
    first = text.split()[0] if text else "?"
    if first in ("max", "-1") or (first.isdecimal() and int(first) >= _UNLIMITED):
        return "none"
    if name == "memory" and first.isdecimal():
        return f"{int(first) / 2**30:.2f} GiB"
    return text


def _why_not(try_it: Callable[[], None]) -> str:
    try:
        try_it()
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def _subreaper() -> None:
    linux.adopt_orphans()
    linux.adopt_orphans(adopt=False)


def _inotify() -> None:
    watch = linux.DirectoryWatch()
    try:
        watch.add(Path("/"))
    finally:
        watch.close()


_FEATURES: dict[str, Callable[[], None]] = {
    "pidfd": lambda: os.close(os.pidfd_open(os.getpid())),
    "memfd": lambda: os.close(os.memfd_create("autoglm-doctor", os.MFD_CLOEXEC)),
    "child subreaper": _subreaper,
    "inotify": _inotify,
}
