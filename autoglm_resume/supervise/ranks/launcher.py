"""How ranks come to be: what every launcher offers. There is one file for each, see `launchers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from autoglm_resume.job.spec import Job
from autoglm_resume.protocol.assignment import Assignment, Endpoint
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.ranks.group import WorkerGroup


class StartUp(NamedTuple):
    """What a rank did to come to its first step."""

    modules: Sequence[str]
    """Installed ones that it imported."""
    own: Sequence[str] = ()
    """The project's own."""
    staged: bool = False
    """Whether the script is split (`autoglm.launch`)."""


class KnownImports(NamedTuple):
    """What the script is known to import, as earlier lives have learnt."""

    modules: Sequence[str] = ()
    end: bool = False
    """Whether what follows them could not be imported ahead, and is left to the ranks."""


class Preview(NamedTuple):
    """What a launcher would run."""

    command: list[str]
    """Of rank 0; a warm rank is forked and then does exactly this."""
    environment: dict[str, str]
    """Of rank 0, beyond what every process of the job inherits."""


class Launcher(Protocol):
    """How ranks come to be, attempt by attempt."""

    def __init__(
        self, context: RunContext, imports: KnownImports, others: Callable[[], frozenset[int]]
    ) -> None:
        """`others` are children of this process that are no ranks."""
        ...

    @classmethod
    def preview(cls, job: Job, assignment: Assignment) -> Preview:
        """What a start with this assignment would run; for `--dry-run`."""
        ...

    def rendezvous(self, fixed: int | None) -> Endpoint:
        """A fresh place to meet, at port `fixed` if there is one; a free port otherwise.

        Raises UsageError that names who has the fixed port.
        """
        ...

    def start(self, assignment: Assignment, group: WorkerGroup) -> None:
        """Start every rank into `group`, unless a stop is asked for first."""
        ...

    def learn(self, seen: StartUp) -> None:
        """The script was seen to do this: have it ready for the next attempt."""
        ...

    def unlearn(self, module: str) -> None:
        """A rank has started over: what was imported ahead is not what its script imports, from
        `module` on.
        """
        ...

    def ended(self) -> None:
        """The ranks are down; after this, `own` names every process there is."""
        ...

    def own(self) -> frozenset[int]:
        """Pids of processes that belong to the launcher and outlive an attempt."""
        ...

    def close(self) -> None:
        """End them."""
        ...
