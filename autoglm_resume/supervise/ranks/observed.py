"""What is seen of the ranks of one attempt while they run."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoglm_resume import events
from autoglm_resume.errors import Interrupted
from autoglm_resume.events import Event
from autoglm_resume.protocol.heartbeats import Beat
from autoglm_resume.supervise.core.evidence import Refusal

WELL = (0, Interrupted.exit_code)
"""Exit codes of a script that did not fail."""


@dataclass
class Observed:
    """What has been seen of the ranks so far."""

    refusals: dict[int, Refusal] = field(default_factory=dict)
    hung: list[int] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)
    beats: tuple[Beat, ...] = ()
    """As they were when ranks were found to hang."""
    stacks: dict[int, tuple[str, ...]] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)
    """Stragglers that ended the attempt, and how many times slower than their peers they are."""
    broken_at: float | None = None
    """Monotonic seconds of the first failure."""
    total: int | None = None
    """Steps the run is to have, if the script said so."""
    unsaved: str = ""
    """Why the save of the furthest step failed, if one did."""
    checkpointed: int = 0
    last_saved: float = 0.0
    """Monotonic seconds of the last save, or of the start."""

    def failed(self, mono: float) -> bool:
        """Something failed at monotonic time `mono`; whether that was the first."""
        first = self.broken_at is None
        if first:
            self.broken_at = mono
        return first

    def hear(self, rank: int, event: Event) -> bool:
        """Remember what a rank or its saver said; whether it concerns others too."""
        match event:
            case events.RankEnded(code=code, mono=at):
                if code not in WELL and at is not None:
                    # Its process takes up to a second to end; nobody has to wait for that.
                    self.failed(at)
                return False
            case events.StepsPlanned(total=total):
                self.total = total
                return False
            case events.PartSaved(began=began):
                self.last_saved = max(self.last_saved, began or 0.0)
            case events.PartFailed(reason=reason) | events.Stopped(unsaved=str(reason)) if reason:
                self.unsaved = reason
            case events.StateRestored(sealed=False, step=step):
                self.checkpointed = max(self.checkpointed, step or 0)
            case events.Refused(id=id, step=step):
                of = f"{id} in memory" if event.sealed else id
                self.refusals[rank] = Refusal(of, step, event.kind, event.reason, event.hint)
            case events.Committed(step=step):
                self.checkpointed = max(self.checkpointed, step)
                self.unsaved = ""
        return True
