"""Who reads which environment variable: a module that reads one while it is imported is another
module in a process where that variable is another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from types import FrameType

RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")
LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "TF_", "XLA_", "GRPC_", "GLOG_")
"""Beginnings of the names that libraries in C read when they are loaded, which nobody sees here."""

_before: dict[str, str] = {}
_read: set[str] = set()
_readers: dict[str, set[str]] = {}


class _Environ(os._Environ):  # type: ignore[type-arg]
    """os.environ, which remembers what is read."""

    def __getitem__(self, name: str) -> str:
        if isinstance(name, str):
            _note(name)
        return str(super().__getitem__(name))


def _note(name: str) -> None:
    _read.add(name)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            _readers.setdefault(frame.f_globals.get("__name__", ""), set()).add(name)
        frame = frame.f_back


def watch() -> None:
    """Begin anew, with the environment as it is, and notice from now on what is read."""
    global _before
    _before = dict(os.environ)
    _read.clear()
    _readers.clear()
    os.environ.__class__ = _Environ


def stop() -> None:
    """Notice nothing more."""
    os.environ.__class__ = os._Environ


def assume(environment: Mapping[str, str]) -> None:
    """Set variables that count as having been there from the beginning."""
    os.environ.update(environment)
    _before.update(environment)


def before() -> dict[str, str]:
    """The environment as it was when `watch` was called, and what it has assumed since."""
    return dict(_before)


def changed() -> frozenset[str]:
    """The variables that differ from that now."""
    now = dict(os.environ)
    return frozenset(k for k in _before.keys() | now.keys() if _before.get(k) != now.get(k))


def read() -> frozenset[str]:
    """The variables that were read since `watch`, whether they were set or not."""
    return frozenset(_read)


def read_of_rank() -> str:
    """One of them that tells a rank; empty if there is none."""
    return next((name for name in RANKS if name in _read), "")


def read_by(modules: Iterable[str], names: frozenset[str]) -> str:
    """The first of `modules` that read one of `names` while it, or what it imports, was imported;
    empty if none did.
    """
    return next((module for module in modules if _readers.get(module, set()) & names), "")


def of_libraries(names: frozenset[str]) -> frozenset[str]:
    """Those among `names` that libraries in C read when they are loaded."""
    return frozenset(name for name in names if name.startswith(LIBRARIES))
