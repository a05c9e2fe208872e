"""What every part of one life of a supervisor works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from autoglm_resume.events import Event, Tell
from autoglm_resume.job.spec import Job
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.stops import Stops


class Presenter(Protocol):
    """Whoever shows a run to a person. Nothing here waits or raises."""

    def worker_line(self, rank: int, text: str | bytes) -> None:
        """One line that `rank` printed."""
        ...

    def bar(self, rank: int, text: str) -> None:
        """The state of a line that `rank` writes anew again and again."""
        ...

    def tick(self) -> None:
        """A moment has passed."""
        ...

    def event(self, event: Event) -> None:
        """What has just gone into the journal."""
        ...

    def traceback(self, rank: int, text: str) -> None:
        """What the first rank to fail recorded."""
        ...

    def note(self, text: str) -> None:
        """A sentence that is no event."""
        ...

    def status(
        self,
        step: int,
        rate: float | None = None,
        loss: float | None = None,
        last_checkpoint: int | None = None,
        attempt: int = 0,
        total: int | None = None,
    ) -> None:
        """Where training is: completed steps (-1 before the first), steps per second."""
        ...


@dataclass(frozen=True)
class RunContext:
    """One life of a run: the same for everything that works on it."""

    loop: EventLoop
    run: RunDirectory
    job: Job
    world_size: int
    environment: Mapping[str, str]
    """What every process of the job inherits."""
    tell: Tell
    stops: Stops
    screen: Presenter
