"""Every event of a journal, and its fields. Pure.

`read` makes events of the lines of a journal, `to_record` lines of events. A journal may be older
than this version, newer, or damaged: a field with a default may be missing; an event that is not
known, or lacks what it needs, is `Unknown`. What a field with `unsaid` stands for is not written.

Seconds are of the monotonic clock where a field says when, and steps are completed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_resume.events.base import *  # noqa: F403  one room, in four files
from autoglm_resume.events.base import TABLE, Event, Unknown
from autoglm_resume.events.job import *  # noqa: F403
from autoglm_resume.events.ranks import *  # noqa: F403
from autoglm_resume.events.supervisor import *  # noqa: F403
from autoglm_resume.records import Unfit


def read(record: Mapping[str, Any]) -> Event:
    """The event of one line of a journal."""
    try:
        return TABLE[record["event"]].from_json(record)
    except (KeyError, TypeError, Unfit):
        return Unknown.from_json({**record, "said": record})


def to_record(event: Event) -> dict[str, Any]:
    """One line of a journal."""
    if isinstance(event, Unknown):
        return dict(event.said)
    return {"event": event.event, **event.to_json()}
