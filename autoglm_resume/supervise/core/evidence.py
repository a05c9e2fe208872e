"""What is known of a worker group that is down: of its ranks, and of the machine. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from autoglm_resume.errors import Interrupted
from autoglm_resume.protocol.heartbeats import NEVER, Beat, Phase

TAIL_LINES = 50
TAIL_BYTES = 8192


@dataclass(frozen=True)
class ErrorRecord:
    """The exception that ended a rank, as it recorded it itself."""

    type: str
    message: str
    traceback: str
    mono: float
    misused: bool = False
    """Whether the script uses autoglm in a way that cannot do."""
    hint: str = ""
    """What to do about that."""


@dataclass(frozen=True)
class Refusal:
    """A rank would not load the checkpoint it was given."""

    id: str
    step: int
    kind: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class RankEvidence:
    """What is known of one rank when the whole group is down."""

    rank: int
    code: int | None = None
    """Exit code, None if it died by a signal or is not known."""
    signal: int | None = None
    order: int = 0
    """Position in the order in which the ranks were seen to end."""
    ended: float = float("inf")
    """Monotonic seconds of its end."""
    by_us: bool = False
    """Whether it ended after we began to stop the group."""
    beat: Beat = NEVER
    error: ErrorRecord | None = None
    refusal: Refusal | None = None
    state: str = ""
    """Process state at the time of a hang, such as “stopped”."""
    stack: tuple[str, ...] = ()
    """Python frames of its main thread at the time of a hang, “file:line in function”, innermost
    first."""
    pid: int | None = None
    log: str = ""
    """The end of what it wrote, more than a person would read; of ranks that failed."""

    @property
    def failed(self) -> bool:
        return not self.by_us and (
            self.signal is not None or self.code not in (0, Interrupted.exit_code, None)
        )


@dataclass(frozen=True)
class GpuErrors:
    """A GPU at the end of an attempt."""

    index: int
    bus: str
    """Address, such as “00000000:3B:00.0”."""
    lost: bool = False
    """Whether the driver has lost it."""
    uncorrected: int | None = None
    """ECC errors since the attempt began that could not be corrected."""


@dataclass(frozen=True)
class Space:
    """A file system at the end of an attempt."""

    path: str
    free: int | None
    """Bytes; None if it did not answer in time."""


@dataclass(frozen=True)
class Machine:
    """What the machine itself says about the time of an attempt; None where it cannot be asked."""

    oom_kills: int | None = None
    """Processes of the ranks' cgroups that the kernel killed for lack of memory."""
    kernel: tuple[str, ...] | None = None
    """Lines of its log that can bear on a rank's end."""
    gpus: tuple[GpuErrors, ...] | None = None
    spaces: tuple[Space, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All of it."""

    ranks: tuple[RankEvidence, ...]
    agent: str = ""
    """What torchrun said about its own end."""
    machine: Machine | None = None


def tail(log: str) -> str:
    """The last lines of a log, as many as a person reads."""
    lines = log.rstrip().splitlines()[-TAIL_LINES:]
    return "\n".join(lines).encode()[-TAIL_BYTES:].decode(errors="ignore")


def where(beat: Beat) -> str:
    """“at step 41, in backward”."""
    if beat.phase is Phase.NONE or beat.step < 0:
        return beat.phase.label if beat.phase is not Phase.NONE else "before its first step"
    return f"at step {beat.step}, {beat.phase.label}"


def signal_name(number: int) -> str:
    """“SIGKILL”."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
