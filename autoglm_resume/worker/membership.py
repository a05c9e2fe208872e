"""Which rank of which attempt of which run a process is: what trackers are named by."""

from __future__ import annotations

import os
from pathlib import Path

from autoglm_resume import output
from autoglm_resume.events import WarningGiven
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.worker.base import settings
from autoglm_resume.worker.base.event_log import EventLog


class Membership:
    """The part of a session that says where it belongs, and speaks for it."""

    _settings: settings.Settings
    _assignment: Assignment | None
    _events: EventLog

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._settings.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._settings.world_size

    @property
    def run_id(self) -> str | None:
        """The same in all attempts of a run, and in no other run; None without `autoglm run`.

        So a tracker goes on where it was: `wandb.init(id=session.run_id, resume="allow")`.
        """
        return self._assignment.run_id if self._assignment is not None else None

    @property
    def attempt(self) -> int:
        """How often the ranks were started before, in this run or by this torchrun."""
        if self._assignment is not None:
            return self._assignment.attempt
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        return int(count) if count.isdecimal() else 0

    @property
    def run_dir(self) -> Path:
        """Directory of the run; without `autoglm run`, that of its checkpoints.

        What a script puts there stays with the run, also where that is moved.
        """
        if self._assignment is not None:
            return Path(self._assignment.directory).parent.parent
        return Path(self._settings.checkpoint.dir)

    def _warn(self, text: str) -> None:
        """Tell a person, once for all ranks; nothing if there is nothing to tell."""
        if text and self.rank == 0:
            self._events.emit(WarningGiven(text=text))
            if self._assignment is None:
                output.say(text)
