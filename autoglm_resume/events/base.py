"""What all events of a journal have in common. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from autoglm_resume.records import Record, unsaid

if TYPE_CHECKING:
    from typing_extensions import Self

_FOR_PEOPLE = frozenset({"reason", "summary", "text", "traceback", "evidence", "tail"})
"""Fields that nothing is concluded from."""


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

    def worded(self, change: Callable[[str], str]) -> Self:
        """The same, with `change` made to every text that is for people only."""
        changed: dict[str, Any] = {}
        for name in _FOR_PEOPLE & vars(self).keys():
            value = getattr(self, name)
            if isinstance(value, str):
                changed[name] = change(value)
            elif isinstance(value, tuple):
                changed[name] = tuple(change(v) if isinstance(v, str) else v for v in value)
        return self.but(**changed) if changed else self


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
