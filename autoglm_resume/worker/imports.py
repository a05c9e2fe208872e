"""What a script imported beyond what its process began with: the next zygote imports it ahead.

Only what is installed: the user's own code may be edited between two attempts, wherever it lies
(beside the script, on PYTHONPATH, in an editable install).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from autoglm_resume.events import ModulesImported

RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")
_asked: list[str] = []
_HERE = str(Path(__file__).parents[1]) + os.sep
# Asked once: sysconfig takes 0.2 ms to say it, and half a second for the modules of one script.
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_known: frozenset[str] = frozenset()


def begin() -> None:
    """Remember what is imported now."""
    global _known
    _known = _known or frozenset(sys.modules)  # a spare imports before the script begins


def imported_since_start() -> list[str]:
    """Names of modules from installed packages, in the order in which they were imported."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in _known and name != "__main__" and _is_installed(module)
    ]


class _Watched(os._Environ):  # type: ignore[type-arg]
    """os.environ, which remembers who asked for what no process knows yet."""

    def __getitem__(self, name: str) -> str:
        if name in RANKS:
            _asked.append(name)
        return str(super().__getitem__(name))


def asked_for_rank() -> str:
    """Which variable that tells a rank was read since `watch_environment`; empty if none was."""
    return _asked[0] if _asked else ""


def watch_environment() -> None:
    """From now on, notice who asks for a rank: whoever does must not be prepared ahead of it."""
    _asked.clear()
    os.environ.__class__ = _Watched


def trust_environment() -> None:
    """The rank is known, or nobody is left to ask: undo `watch_environment`."""
    os.environ.__class__ = os._Environ


def own_since_start() -> list[str]:
    """Names of the project's own modules, in the order in which they were imported.

    Only a process that is made anew for every attempt may import these ahead of it.
    """
    return [name for name in list(sys.modules) if name not in _known and _own_file(name)]


def said(*, staged: bool) -> ModulesImported:
    """All of them; `staged`: the script can become a spare."""
    return ModulesImported(
        modules=tuple(imported_since_start()), own=tuple(own_since_start()), staged=staged
    )


def own_files() -> list[str]:
    """The files of all modules that are the project's own."""
    return [file for name in list(sys.modules) if (file := _own_file(name))]


def _own_file(name: str) -> str:
    module = sys.modules.get(name)
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if name == "__main__" or not isinstance(origin, str) or _is_installed(module):
        return ""
    return "" if origin.startswith(_HERE) else origin


def _is_installed(module: object) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if not isinstance(origin, str):
        return False
    packages = {"site-packages", "dist-packages"} & set(Path(origin).parts)
    return bool(packages) or origin in ("built-in", "frozen") or origin.startswith(_STDLIB)
