"""What a script imported beyond what its process began with: the next zygote imports it ahead."""

from __future__ import annotations

import os
import sys

_known: frozenset[str] = frozenset()
_own: tuple[str, ...] = ()


def begin(*own: str) -> None:
    """Remember what is imported now; modules under the directories `own` are the user's code.

    The user's own code is never imported ahead: it may be edited between two attempts.
    """
    global _known, _own
    _known = frozenset(sys.modules)
    _own = tuple(os.path.realpath(path) + os.sep for path in own)


def imported_since_start() -> list[str]:
    """Names of modules from installed packages, in the order in which they were imported."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in _known and name != "__main__" and _is_installed(module)
    ]


def _is_installed(module: object) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if not isinstance(origin, str):
        return False
    # A virtual environment usually lies inside the project's own directory.
    return origin.startswith((sys.prefix, sys.base_prefix)) or not os.path.realpath(
        origin
    ).startswith(_own)
