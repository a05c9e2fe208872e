"""What every process that `python -m autoglm_resume…` starts does about its path."""

from __future__ import annotations

import sys


def drop_own_path() -> None:
    """Take back what `python -m` put in front of the path: the place where this package lies."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)
