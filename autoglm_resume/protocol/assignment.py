"""What a rank is told by its supervisor: torchrun's environment, and one JSON file.

The environment is exactly torchrun's, so scripts written for torchrun run unchanged. What only
autoglm's own session needs is in the file that AUTOGLM_ASSIGNMENT names.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.store.retention import KeepRules
from autoglm_resume.protocol.loss_guard import Bounds

ASSIGNMENT = "AUTOGLM_ASSIGNMENT"
HOME = Path(__file__).parents[2]
"""Where this package lies: `python -m` finds it there, whatever the user's directory holds."""
RANK = str(HOME / "autoglm_resume" / "worker" / "rank.py")
"""The file whose frames are below those of a script."""
STACKS = signal.SIGRTMAX - 3
"""Asks a rank to write the stacks of its threads; a signal that nobody else is known to use."""
RUN = "AUTOGLM_RUN"
"""Names the run directory to every process of a run, so that none can be left behind unknown."""
LARGEST_JOB = 1 << 26
"""Bytes of a run's job.json: what a job file of a megabyte comes to, and more."""
SUPERVISOR = "AUTOGLM_SUPERVISOR"
"""Process id of the supervisor, in the environment of all that a run starts: so its own orphans can
be told from others'."""


ALWAYS = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",  # torch.optim.AdamW() imports it, for as long as torch itself takes
    "torch.utils.data",
    "autoglm_resume.worker.beginning",
)
"""What every zygote imports ahead."""


@dataclass(frozen=True)
class Source:
    """What to run."""

    script: str | None
    module: str | None
    args: tuple[str, ...]
    workdir: str

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Source:
        """What `dataclasses.asdict` made of it."""
        return cls(**{**data, "args": tuple(data["args"])})


class Endpoint(NamedTuple):
    """Where the ranks of an attempt meet."""

    port: int
    served: bool
    """Whether a store listens there already; otherwise rank 0 has to open one."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that the gate accepted for this attempt."""

    id: str
    step: int
    digest: str
    """Of its manifest; empty if it has none yet."""
    seals: tuple[str, ...] = ()
    """Of every rank's snapshot, where it is to be taken from memory; see write/in_memory.py."""


@dataclass(frozen=True)
class Beginning:
    """The checkpoint, mostly of another run, whose objects a run has at step 0."""

    path: str
    """Its directory."""
    step: int
    digest: str
    """Of its manifest."""
    only: tuple[str, ...] = ()
    """The objects that come from there; without any, all."""


@dataclass(frozen=True)
class Checkpointing:
    """How to save and what to keep; see the job file's `checkpoint`."""

    dir: str
    every_steps: int | None = None
    keep: KeepRules = field(default_factory=KeepRules)
    memory: int = 2
    on_busy: Literal["skip", "wait"] = "skip"
    on_error: Literal["continue", "stop"] = "continue"
    options: SaveOptions = field(default_factory=SaveOptions)
    rename: dict[str, str] = field(default_factory=dict)
    strict: bool = True
    skip: tuple[str, ...] = ()
    """What this attempt does not take from its checkpoint."""
    branches: tuple[Branch, ...] = ()
    """(step, attempt) where the run left newer checkpoints behind on purpose."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Checkpointing:
        """What `dataclasses.asdict` made of it."""
        keep, options = KeepRules.from_json(data["keep"]), SaveOptions(**data["options"])
        branches = tuple(Branch(step, attempt) for step, attempt in data["branches"])
        known = {"keep": keep, "options": options, "branches": branches}
        return cls(**{**data, **known, "skip": tuple(data["skip"])})


@dataclass(frozen=True)
class Assignment:
    """One attempt, as its ranks need to know it. All paths are absolute."""

    run_id: str
    attempt: int
    world_size: int
    master_addr: str
    master_port: int
    agent_store: bool
    """Whether a store listens there already, as torchrun's agent provides one."""
    max_restarts: int
    supervisor: int
    """Process id; ranks die with it."""
    directory: str
    """Of this attempt: logs, events and errors of every rank."""
    board: str
    source: Source
    checkpoint: Checkpointing
    resume: ResumePoint | None
    check_model: bool
    bounds: Bounds = field(default_factory=Bounds)
    """Of the loss."""
    savers: tuple[str, ...] = ()
    """Name of each rank's saver."""
    config_files: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """The job's `env`."""
    begins: Beginning | None = None
    """Where there is nothing to resume."""

    def log(self, rank: int) -> Path:
        """Standard output and error of `rank`."""
        return Path(self.directory) / f"rank-{rank}.log"

    def events(self, rank: int) -> Path:
        """Events of `rank`, one JSON object a line."""
        return Path(self.directory) / f"rank-{rank}.events.jsonl"

    def error(self, rank: int) -> Path:
        """The exception that ended `rank`, written before the process ends."""
        return Path(self.directory) / f"rank-{rank}.error.json"

    def stacks(self, rank: int) -> Path:
        """Stacks of the threads of `rank`, if it hung."""
        return Path(self.directory) / f"rank-{rank}.stacks.txt"

    @property
    def path(self) -> Path:
        """The assignment's own file."""
        return Path(self.directory) / "assignment.json"

    def to_json(self) -> bytes:
        """File content."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> Assignment:
        """Read what `to_json` wrote."""
        data = json.loads(path.read_bytes())
        source = data.pop("source")
        resume, begins = data.pop("resume"), data.pop("begins")
        return cls(
            source=Source.from_json(source),
            resume=ResumePoint(**{**resume, "seals": tuple(resume["seals"])}) if resume else None,
            begins=Beginning(**{**begins, "only": tuple(begins["only"])}) if begins else None,
            checkpoint=Checkpointing.from_json(data.pop("checkpoint")),
            bounds=Bounds(**data.pop("bounds")),
            config_files=tuple(data.pop("config_files")),
            savers=tuple(data.pop("savers")),
            **data,
        )

    @classmethod
    def from_environment(cls) -> Assignment | None:
        """The assignment of this process, None without a supervisor."""
        path = os.environ.get(ASSIGNMENT)
        return cls.load(Path(path)) if path else None

    def rank_environment(self, rank: int) -> dict[str, str]:
        """What `rank` finds in its environment beyond the supervisor's own."""
        world = str(self.world_size)
        return {
            **self.environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": self.run_id,
            "TORCHELASTIC_USE_AGENT_STORE": str(self.agent_store),
            "TORCHELASTIC_ERROR_FILE": str(Path(self.directory) / f"rank-{rank}.torchelastic.json"),
            ASSIGNMENT: str(self.path),
        }


def shared_environment(world_size: int) -> dict[str, str]:
    """Defaults that torchrun sets for every rank and that libraries read while being imported."""
    defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if world_size > 1:
        defaults["OMP_NUM_THREADS"] = "1"
    return {name: value for name, value in defaults.items() if name not in os.environ}
