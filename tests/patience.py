"""How long a test waits for what must come, on any machine and beside any load."""

from __future__ import annotations

import time

PATIENCE = 180.0
"""Seconds: only what hangs takes them, so that no test is a measurement."""


def soon() -> float:
    """The monotonic time at which to give up."""
    return time.monotonic() + PATIENCE
