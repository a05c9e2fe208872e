"""Events as the journal has them, for tests that look at what was told."""

from __future__ import annotations

from typing import Any

from autoglm_resume.events import Event, to_record


def line(event: Event) -> tuple[str, dict[str, Any]]:
    """(name, fields)."""
    record = to_record(event)
    return record.pop("event"), record
