"""A journal cut into what it tells of: the lives of supervisors, and attempts. Pure.

Ranks' events reach the journal a little later than those of the supervisor, so within an attempt
only the monotonic time orders them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from autoglm_resume import events
from autoglm_resume.events import Event

E = TypeVar("E", bound=Event)

ENDS = (events.RunCompleted, events.RunInterrupted, events.RunFailed)
"""The last words of a supervisor."""
_TELL_STEP = (
    *(events.FirstStep, events.StateRestored, events.PartSaved, events.Committed),
    *(events.GroupFailed, events.Finished, events.Stopped, events.AttemptEnded),
)


def mono(event: Event) -> float:
    """Monotonic seconds of an event."""
    return event.mono or 0.0


def step_of(event: Event | None) -> int | None:
    """Completed steps that an event speaks of, None where no step was completed."""
    step: int | None = getattr(event, "step", None)
    return step if step is not None and step >= 0 else None


@dataclass
class Life:
    """What one supervisor wrote."""

    boot: str
    """Of the machine; times of different boots cannot be compared."""
    events: list[Event] = field(default_factory=list)

    @property
    def begin(self) -> float:
        """Monotonic seconds of the first event."""
        return min(self._times(), default=0.0)

    @property
    def end(self) -> float:
        """Monotonic seconds of the last event."""
        return max(self._times(), default=0.0)

    def _times(self) -> list[float]:
        return [event.mono for event in self.events if event.mono is not None]


@dataclass
class Segment:
    """One attempt: the event that began it, the gate it went through, and all that was said."""

    started: events.AttemptStarted
    gate: events.GatePassed | None
    events: list[Event] = field(default_factory=list)

    @property
    def attempt(self) -> int:
        """Its number."""
        return self.started.attempt or 0

    @property
    def start_step(self) -> int:
        """Step of the checkpoint it began with, 0 without one."""
        return step_of(self.started) or 0

    def all(self, *kinds: type[E]) -> list[E]:
        """Events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    def last(self, kind: type[E]) -> E | None:
        """The last event of this kind."""
        return next((event for event in reversed(self.events) if isinstance(event, kind)), None)

    @property
    def last_step(self) -> int | None:
        """Steps completed by the furthest rank, None if not known."""
        known = map(step_of, self.all(*_TELL_STEP))
        return max((step for step in known if step is not None), default=None)

    @property
    def stepping_since(self) -> float | None:
        """When its first step began, None if none was completed: the ranks had their state then."""
        stepped = self.all(events.FirstStep)
        if not stepped:
            return None
        signs = (events.StateRestored, events.ModelReported, events.FirstStep)
        return next(max(map(mono, found)) for sign in signs if (found := self.all(sign)))

    @property
    def stepped(self) -> float | None:
        """When its first step was complete on every rank that said so."""
        return max(map(mono, self.all(events.FirstStep)), default=None)

    def reached(self, step: int) -> float | None:
        """When `step` steps were complete: known where a save began, estimated in between."""
        known = self._known()
        before = max((point for point in known if point[0] <= step), default=None)
        after = min((point for point in known if point[0] > step), default=None)
        if before is None or after is None or before[0] == step:
            return before[1] if before else None
        share = (step - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])

    def _known(self) -> list[tuple[int, float]]:
        """(step, when it was complete)."""
        points: dict[int, float] = {}
        if (since := self.stepping_since) is not None:
            points[self.start_step] = since
        for event in self.all(events.FirstStep):
            if (step := step_of(event)) is not None:
                points[step] = max(mono(event), points.get(step, 0.0))
        if (ended := self.last(events.AttemptEnded)) and (step := step_of(ended)) is not None:
            at = ended.last_step_mono
            if at and since is not None and at >= since:
                points.setdefault(step, at)
        # The ranks save at the same step, and each says when that step was complete.
        saves: dict[int, float] = {}
        for save in self.events:
            if isinstance(save, events.PartSaved | events.Committed):
                step, at = step_of(save), save.began
                if step is not None and at is not None and step != self.start_step:
                    saves[step] = max(at, saves.get(step, 0.0))
        return sorted({**points, **saves}.items())


def lives(journal: Iterable[Event]) -> list[Life]:
    """The supervisors of a run, oldest first."""
    found: list[Life] = []
    for event in journal:
        if isinstance(event, events.SupervisorStarted):
            # What comes before it (`run_started`) belongs to the same process.
            only_introduced = len(found) == 1 and found[0].boot == "" and not _worked(found[0])
            if only_introduced:
                found[0].boot = event.boot_id
            else:
                found.append(Life(event.boot_id))
        elif not found:
            found.append(Life(""))
        found[-1].events.append(event)
    return found


def _worked(life: Life) -> bool:
    return any(not isinstance(event, events.RunStarted) for event in life.events)


def attempts(journal: Iterable[Event]) -> list[Segment]:
    """The attempts of a run, oldest first.

    A rank's event names its attempt, which may not have been announced yet, or be over already;
    the supervisor's events between two attempts name the first, but a gate opens the second.
    """
    everything = list(journal)
    found: dict[int, Segment] = {}
    gate: events.GatePassed | None = None
    for event in everything:
        match event:
            case events.GatePassed():
                gate = event
            case events.AttemptStarted():
                found.setdefault(event.attempt or 0, Segment(event, gate))
                gate = None
    latest: Segment | None = None
    for event in everything:
        home = latest if event.attempt is None else found.get(event.attempt, latest)
        if isinstance(event, events.AttemptStarted):
            latest = home
        elif home is not None and not isinstance(event, events.GatePassed):
            home.events.append(event)
    return list(found.values())
