"""Counters of the kernel's OOM killer, of the cgroups that processes are in (version 1 and 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

V1, V2 = "memory.oom_control", "memory.events"


def counters(pids: Iterable[int], proc: Path = Path("/proc")) -> dict[Path, int]:
    """How many processes were killed so far in the cgroup of each of `pids`, by counter file.

    The kernel counts a kill for the killed process's own cgroup, whatever the limit that was hit.
    """
    mounts = _mounts(proc)
    found: dict[Path, int] = {}
    for pid in pids:
        for path in _files(proc, pid, mounts):
            if path not in found and (count := _read(path)) is not None:
                found[path] = count
    return found


def rise(before: Mapping[Path, int]) -> int | None:
    """Kills since `counters` returned `before`; None if there is no counter to read."""
    after = [(count, _read(path)) for path, count in before.items()]
    known = [now - count for count, now in after if now is not None]
    return sum(known) if known else None


def _files(proc: Path, pid: int, mounts: Mapping[str, tuple[Path, str]]) -> Iterable[Path]:
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            name = V2 if number == "0" else V1 if "memory" in controllers.split(",") else ""
            if name in mounts:
                mount, root = mounts[name]
                # In a container the mount shows only the part of the tree below its own group.
                inside = path.removeprefix(root.rstrip("/"))
                yield mount / inside.strip("/") / name


def _mounts(proc: Path) -> dict[str, tuple[Path, str]]:
    """Where the tree of each version is mounted, and which part of it."""
    found: dict[str, tuple[Path, str]] = {}
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "mountinfo").read_text().splitlines():
            fields, _, source = line.partition(" - ")
            kind, _, options = source.split(" ", 2)
            if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
                root, mount = fields.split(" ")[3:5]
                found[V2 if kind == "cgroup2" else V1] = Path(mount), root
    return found


def _read(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return None
