"""What all events of a journal have in common. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from autoglm_resume.records import Record, unsaid


class Event(Record):
    """What happened, with its stamps: None until it is told."""

    event: ClassVar[str] = ""
    """Its name in the journal: that of the class, in small letters, if it is not given."""

    time: float | None = unsaid(None)
    """Unix seconds."""
    mono: float | None = unsaid(None)
    attempt: int | None = unsaid(None)
    """The one that it is of, or that comes next."""

    def __init_subclass__(cls, name: str | None = "") -> None:
        """Without a name (None) it is no event of its own."""
        super().__init_subclass__()
        if name is not None:
            cls.event = name or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
            TABLE[cls.event] = cls


TABLE: dict[str, type[Event]] = {}
"""Events by their names in the journal."""


class OfRank(Event, name=None):
    """Told by a rank or its saver, or of a rank."""

    rank: int | None = unsaid(None)


class Unknown(Event, name=None):
    """Of another version, or damaged."""

    said: Mapping[str, Any]
    """All that the journal has."""


class Tell(Protocol):
    """Puts an event into the journal, stamped with what it has no stamps of."""

    def __call__(self, event: Event, /) -> object: ...
