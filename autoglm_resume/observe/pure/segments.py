"""A journal cut into what it tells of: the lives of supervisors, and attempts. Pure.

Ranks' events reach the journal a little later than those of the supervisor, so within an attempt
only the monotonic time orders them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from autoglm_resume.journal import Event

_LARGEST = 1e18
"""No step, time or size of ours comes near; what is beyond (or not finite) was damaged."""
_TELL_STEP = ("first_step", "restored", "saved", "committed", "failure", "finished", "stopped")


def number(event: Event, key: str) -> float | None:
    """The number under `key`; None where there is none, whatever there is instead."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value)


def mono(event: Event) -> float:
    """Monotonic seconds of an event."""
    return number(event, "mono") or 0.0


def step_of(event: Event) -> int | None:
    """Completed steps that an event speaks of, None where no step was completed."""
    value = number(event, "step")
    return int(value) if value is not None and value >= 0 else None


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
        return [at for event in self.events if (at := number(event, "mono")) is not None]


@dataclass
class Segment:
    """One attempt: the event that began it, the gate it went through, and all that was said."""

    started: Event
    gate: Event | None
    events: list[Event] = field(default_factory=list)

    @property
    def attempt(self) -> int:
        """Its number."""
        return int(number(self.started, "attempt") or 0)

    @property
    def start_step(self) -> int:
        """Step of the checkpoint it began with, 0 without one."""
        return step_of(self.started) or 0

    def all(self, *names: str) -> list[Event]:
        """Events of these names."""
        return [event for event in self.events if event["event"] in names]

    def last(self, name: str) -> Event | None:
        """The last event of this name."""
        return next((e for e in reversed(self.events) if e["event"] == name), None)

    @property
    def last_step(self) -> int | None:
        """Steps completed by the furthest rank, None if not known."""
        known = (
            step_of(event)
            for event in self.events
            if event["event"] in (*_TELL_STEP, "attempt_ended")
        )
        return max((step for step in known if step is not None), default=None)

    @property
    def stepping_since(self) -> float | None:
        """When its first step began, None if none was completed: the ranks had their state then."""
        stepped = self.all("first_step")
        if not stepped:
            return None
        ready = self.all("restored") or self.all("model") or stepped
        return max(map(mono, ready))

    @property
    def stepped(self) -> float | None:
        """When its first step was complete on every rank that said so."""
        return max(map(mono, self.all("first_step")), default=None)

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
        for event in self.all("first_step"):
            if (step := step_of(event)) is not None:
                points[step] = max(mono(event), points.get(step, 0.0))
        if (ended := self.last("attempt_ended")) and (step := step_of(ended)) is not None:
            at = number(ended, "last_step_mono")
            if at and since is not None and at >= since:
                points.setdefault(step, at)
        # The ranks save at the same step, and each says when that step was complete.
        saves: dict[int, float] = {}
        for event in self.all("saved", "committed"):
            step, at = step_of(event), number(event, "began")
            if step is not None and at is not None and step != self.start_step:
                saves[step] = max(at, saves.get(step, 0.0))
        return sorted({**points, **saves}.items())


def lives(events: Iterable[Event]) -> list[Life]:
    """The supervisors of a run, oldest first."""
    found: list[Life] = []
    for event in events:
        if event["event"] == "supervisor_started":
            boot = str(event.get("boot_id", ""))
            # What comes before it (`run_started`) belongs to the same process.
            only_introduced = len(found) == 1 and found[0].boot == "" and not _worked(found[0])
            if only_introduced:
                found[0].boot = boot
            else:
                found.append(Life(boot))
        elif not found:
            found.append(Life(""))
        found[-1].events.append(event)
    return found


def _worked(life: Life) -> bool:
    return any(event["event"] != "run_started" for event in life.events)


def attempts(events: Iterable[Event]) -> list[Segment]:
    """The attempts of a run, oldest first.

    A rank's event names its attempt, which may not have been announced yet, or be over already;
    the supervisor's events between two attempts name the first, but a gate opens the second.
    """
    everything = list(events)
    found: dict[int, Segment] = {}
    gate: Event | None = None
    for event in everything:
        if event["event"] == "gate":
            gate = event
        elif event["event"] == "attempt_started":
            segment = Segment(event, gate)
            found.setdefault(segment.attempt, segment)
            gate = None
    latest: Segment | None = None
    for event in everything:
        named = number(event, "attempt")
        home = latest if named is None else found.get(int(named), latest)
        if event["event"] == "attempt_started":
            latest = home
        elif home is not None and event["event"] != "gate":
            home.events.append(event)
    return list(found.values())
