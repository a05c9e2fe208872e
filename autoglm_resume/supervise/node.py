"""The seam between a supervisor and the ranks of one machine.

Everything above it speaks of nodes and of plain data; pids, boards, sockets and files of a machine
stay below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.events import Event
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.protocol.heartbeats import Beat, Control
from autoglm_resume.supervise.core.evidence import Evidence
from autoglm_resume.supervise.core.history import Silences
from autoglm_resume.supervise.core.liveness import Look
from autoglm_resume.supervise.ranks.group import Exit
from autoglm_resume.supervise.ranks.launcher import StartUp
from autoglm_resume.supervise.ranks.observed import Observed


@dataclass(frozen=True)
class Member:
    """One machine of an attempt."""

    node: str
    ranks: int
    """How many it has; those of the first member come first."""


@dataclass(frozen=True)
class Order:
    """What was decided for one attempt, the same for each of its nodes: data that could travel."""

    number: int
    term: int
    """Of whoever decided it. A machine alone has one leader for ever, in term 0."""
    resume: ResumePoint | None
    members: tuple[Member, ...]
    branches: tuple[Branch, ...] = ()
    """Where the run left newer checkpoints behind on purpose; see `history.History`."""

    @property
    def world_size(self) -> int:
        """Ranks of all members."""
        return sum(member.ranks for member in self.members)


@dataclass(frozen=True)
class Launched:
    """The ranks of a node as they were started."""

    port: int
    """Where they meet."""
    pids: Mapping[int, int]
    """By rank; empty if a stop came first."""


class Listener(Protocol):
    """Who wants to know what becomes of the ranks of an attempt."""

    def heard(self, rank: int, event: Event) -> None:
        """Rank `rank` wrote this."""
        ...

    def exited(self, rank: int, how: Exit) -> None:
        """Its process has ended, not by us, and not well."""
        ...


class Node(Protocol):
    """The ranks of one machine, attempt after attempt."""

    name: str
    left: frozenset[int]
    """Pids of what scripts that came to their good end have left running, which is on purpose."""

    def start(self, order: Order, listener: Listener) -> Launched:
        """Begin an attempt. Raises UsageError that names who has a fixed MASTER_PORT."""
        ...

    def learn(self, seen: StartUp) -> None:
        """What a rank did to come to its first step: have it ready for the next attempt."""
        ...

    def unlearn(self, module: str) -> None:
        """A rank has started over: from `module` on, nothing is to be imported ahead."""
        ...

    @property
    def alive(self) -> Sequence[int]:
        """Ranks whose processes have not ended."""
        ...

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it still lives."""
        ...

    def beats(self) -> tuple[Beat, ...]:
        """The last sign of progress of each rank."""
        ...

    def announce(self, control: Control) -> None:
        """Ask the ranks for something at a step that all of them have before them."""
        ...

    def looks(self, now: float) -> dict[int, Look]:
        """Its ranks as `liveness.hung` judges them; none while every one of them beats."""
        ...

    def condemn(self, ranks: Sequence[int], now: float) -> dict[int, str]:
        """These ranks count as hung: what the kernel says of each."""
        ...

    def spent(self) -> list[dict[int, float]]:
        """Seconds that each rank has spent so far, by phase."""
        ...

    def stacks(self) -> dict[int, tuple[str, ...]]:
        """Where every rank that lives is, frames innermost first, before it is killed."""
        ...

    def broken(self) -> None:
        """A failure was noticed: what ranks print from now on waits until it has been told."""
        ...

    def stop(self, grace: float, *, at_once: bool) -> None:
        """End the ranks: SIGTERM, and SIGKILL after `grace` seconds. Raises Unkillable.

        Those whose scripts have ended may do first what these left to their exit, unless all are
        to end `at_once`.
        """
        ...

    def evidence(self, seen: Observed) -> Evidence:
        """What ranks that are down have left, and what the machine says of the time since."""
        ...

    @property
    def well(self) -> bool:
        """Whether every rank has come to its end by itself, and without an error."""
        ...

    def ended(self) -> Silences:
        """Forget the attempt; returns how long its ranks were silent between beats."""
        ...

    def settle(self, from_memory: Callable[[str], bool]) -> Sealed | None:
        """Have what the ranks left in memory on storage, or what may be taken `from_memory`."""
        ...

    def close(self) -> None:
        """End what outlives attempts."""
        ...
