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
from autoglm_resume.worker import environment_reads

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


def own_since_start() -> list[str]:
    """Names of the project's own modules, in the order in which they were imported.

    Only a process that is made anew for every attempt may import these ahead of it.
    """
    return [name for name in list(sys.modules) if name not in _known and _own_file(name)]


def said(*, staged: bool) -> ModulesImported:
    """All of them, up to one that read a variable that the script has set, which a process where
    it is not set would import otherwise; `staged`: the script can become a spare.
    """
    modules = imported_since_start()
    if other := environment_reads.read_by(modules, environment_reads.changed()):
        modules = modules[: modules.index(other)]
    environment_reads.stop()
    return ModulesImported(modules=tuple(modules), own=tuple(own_since_start()), staged=staged)


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
    return origin in ("built-in", "frozen") or origin.startswith(_STDLIB) or _is_packaged(origin)


def is_of_python(module: object) -> bool:
    """Whether it is of the standard library."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if not isinstance(origin, str) or origin in ("built-in", "frozen"):
        return True
    return origin.startswith(_STDLIB) and not _is_packaged(origin)


def _is_packaged(origin: str) -> bool:
    return bool({"site-packages", "dist-packages"} & set(Path(origin).parts))
