"""A run's directory may be moved, copied or set aside: what it recorded of itself moves with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATHS = ("run_dir", "workdir", "script")
_CHECKPOINT_PATHS = ("dir", "replicas")


def home_of(job: Mapping[str, Any]) -> Path | None:
    """Where the run directory was when this job was recorded in it; None if that is not said."""
    home = job.get("run_dir")
    return Path(home) if isinstance(home, str) and home and "\0" not in home else None


def relocated(job: Mapping[str, Any], now: Path) -> dict[str, Any]:
    """The recorded `job` of the run directory that is at `now`.

    Paths that lay in the directory lie in it still, wherever it is; all others are as they were.
    """
    home = home_of(job)
    if home is None or home == now or same(home, now):
        return dict(job)
    moved = {**job, **{key: _moved(job[key], home, now) for key in _PATHS if key in job}}
    how = job.get("checkpoint")
    if isinstance(how, Mapping):
        known = {key: _moved(how[key], home, now) for key in _CHECKPOINT_PATHS if key in how}
        moved["checkpoint"] = {**how, **known}
    return moved


def same(path: Path, other: Path) -> bool:
    """Whether both are one place, by whatever links."""
    try:
        return path.resolve() == other.resolve()
    except (OSError, RuntimeError):  # links that lead in circles
        return False


def _moved(written: Any, home: Path, now: Path) -> Any:
    if isinstance(written, list | tuple):
        return [_moved(each, home, now) for each in written]
    if isinstance(written, str) and Path(written).is_relative_to(home):
        return str(now / Path(written).relative_to(home))
    return written
