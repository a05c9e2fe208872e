"""What a job is: every field, its default, and what it may hold.

The models are frozen and refuse unknown keys. `load` fills in what depends on where the job file
lies (`name`, `workdir`, `run_dir`, `checkpoint.dir`), so a `Job` in hand is complete: its paths are
absolute, its durations are seconds, its sizes are bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from autoglm_resume.job import secret, units
from autoglm_resume.job.answers import On, Window
from autoglm_resume.job.checkpoint import Checkpoint
from autoglm_resume.job.draft import ASIDE
from autoglm_resume.job.fields import (
    Count,
    CountOrZero,
    Duration,
    FilePath,
    ModuleName,
    OneMachine,
    PositiveDuration,
    Size,
    Strictness,
    Switch,
    Text,
    as_list,
    as_mapping,
    as_name,
    as_processes,
    as_variable,
    one_of,
    problem,
)
from autoglm_resume.job.notify import Notice
from autoglm_resume.job.section import Section
from autoglm_resume.job.slurm import SlurmOptions


class Heartbeat(Section):
    """How long a rank may be silent before it counts as hung."""

    timeout: PositiveDuration = Field(
        default=300.0, description="Longest time between two signs of progress of a rank."
    )
    startup: PositiveDuration = Field(
        default=900.0,
        description="Longest time until a rank's first completed step, and for one save.",
    )


class Restart(Section):
    """How often, and how soon, a failed attempt is tried again."""

    max_restarts: CountOrZero = Field(
        default=10,
        description="Restarts after failures. New checkpointed steps refill this budget.",
    )
    backoff: Duration = Field(
        default=1.0, description="Delay when a restart made no progress; doubles each time."
    )
    max_backoff: Duration = Field(
        default=120.0, validate_default=True, description="The delay grows no longer than this."
    )
    without_progress: Count = Field(
        default=3,
        description="Attempts in a row that may come no further than before. A failure that would "
        "come again (an exception at the same place) then ends the run; one that time may heal (a "
        "lost connection, a killed rank) is given a cool-down and one more try.",
    )
    cool_down: Duration = Field(
        default=300.0,
        validate_default=True,
        description="How long nothing is tried after failures without progress.",
    )
    cool_downs: CountOrZero = Field(
        default=3, description="Give up after this many cool-downs in a row without progress."
    )
    window: Window = Field(
        default_factory=Window, description="How many failures are too many, progress or not."
    )
    longest_pause: Duration = Field(
        default=86400.0,
        validate_default=True,
        description="How long to wait for space on a full disk, or for storage that is away.",
    )
    on: On = Field(
        default_factory=dict,
        description="Answers of the job's own to failures by class (`cuda_oom`), exit code (`17`) "
        "or /regular expression/ in the message or the last lines of the log: `restart`, "
        "`roll_back` (from an older checkpoint), `pause` (until there is space and the storage "
        "answers), `smaller` (without that rank's GPU, where `guards.world_size` is elastic), "
        "`requeue` (exit 75, under a scheduler) or `stop`. A pattern counts before a code, a code "
        "before a class.",
    )
    grace: Duration = Field(
        default=0.0,
        description="From SIGTERM to SIGKILL for the other ranks when one has failed; 0: at once.",
    )

    @field_validator("max_backoff")
    @classmethod
    def _not_below_backoff(cls, longest: float, info: ValidationInfo) -> float:
        first = info.data.get("backoff", 0.0)
        if longest < first:
            texts = units.format_duration(longest), units.format_duration(first)
            raise problem("{} is shorter than restart.backoff, {}".format(*texts))
        return longest


class Preemption(Section):
    """What happens when the run is asked to stop."""

    grace: Duration = Field(
        default=60.0, description="How long the ranks may take to save and stop when asked to."
    )


class Guards(Section):
    """What must hold before a checkpoint is used or a run is started."""

    world_size: Annotated[
        Literal["strict", "elastic", "off"], one_of("strict", "elastic", "off")
    ] = Field(
        default="strict",
        description="`strict` refuses checkpoints made by another number of ranks; `elastic` "
        "deals them anew to the ranks there are; `off` does not look.",
    )
    model: Switch = Field(default="strict", description="Refuse checkpoints made by another model.")
    config_files: Annotated[tuple[FilePath, ...], BeforeValidator(as_list)] = Field(
        default=(), description="Files whose content is part of the model hash."
    )
    nan_losses: CountOrZero = Field(
        default=3,
        description="Roll back when so many reported losses in a row are NaN or infinite; 0: "
        "never.",
    )
    loss_spike: CountOrZero = Field(
        default=0,
        description="Roll back when three reported losses in a row are more than so many times "
        "the median of the last hundred; 0: never.",
    )
    free_disk: Size = Field(
        default=2**30,
        description="Refuse to start with less free space at the checkpoint directory.",
    )
    # Of the machine, before a start: `strict` refuses, `lenient` warns, `off` does not look.
    disk: Strictness = Field(
        default="lenient",
        description="Room for the next checkpoints, as large as those of this run were measured "
        "to be.",
    )
    memory: Strictness = Field(
        default="lenient", description="Host memory for the snapshots of `checkpoint.memory`."
    )
    shm: Strictness = Field(
        default="lenient", description="Room in /dev/shm for NCCL and loader workers."
    )
    gpus: Strictness = Field(
        default="lenient", description="Every visible GPU answers and is healthy (NVML)."
    )
    gpu_memory: Strictness = Field(
        default="lenient",
        description="No other processes use the GPUs' memory. Those that an earlier supervisor of "
        "this run left behind are always ended first, others never.",
    )
    clock: Strictness = Field(
        default="lenient", description="The clock is not behind what this run has written."
    )
    storage: Strictness = Field(
        default="strict", description="The checkpoint directory answers within 10 s."
    )
    collective: Strictness = Field(
        default="off",
        description="As many processes as there will be ranks complete a collective round before "
        "the first start; it takes seconds.",
    )


class Logs(Section):
    """What of the ranks' output is shown. The log files always hold all of it."""

    console: Annotated[Literal["all", "rank0", "none"], one_of("all", "rank0", "none")] = Field(
        default="all", description="Whose output the console shows."
    )


class Job(Section):
    """A training job for autoglm. Paths are relative to the directory of the job file."""

    name: Annotated[str, BeforeValidator(as_name)] = Field(
        description="Name of the run. Default: the name of the job file without its ending."
    )
    script: FilePath | None = Field(
        default=None,
        description="The training script, relative to `workdir`. Or give `module`.",
    )
    module: ModuleName | None = Field(
        default=None,
        validate_default=True,
        description="The training module, run as `python -m module`. Or give `script`.",
    )
    args: Annotated[tuple[Text, ...], BeforeValidator(as_list)] = Field(
        default=(), description="Arguments of the script."
    )
    workdir: FilePath = Field(
        description="Directory the ranks run in. Default: the directory of the job file."
    )
    env: Annotated[
        dict[Annotated[str, AfterValidator(as_variable)], Text], BeforeValidator(as_mapping)
    ] = Field(default_factory=dict, description="Environment variables for the ranks.")
    run_dir: FilePath = Field(
        description="Directory of the run: journal, logs, state. "
        "Default: `runs/NAME` in the directory of the job file."
    )
    nproc_per_node: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(as_processes)
    ] = Field(
        default="auto",
        description="Ranks on this machine. `auto`: one per visible GPU, 1 without any.",
    )
    nnodes: OneMachine = Field(
        default=1, description="Number of machines. This version runs on one."
    )
    launcher: Annotated[Literal["warm", "torchrun"], one_of("warm", "torchrun")] = Field(
        default="warm",
        description="`warm` forks ranks from a process that has torch imported; `torchrun` runs "
        "the real torchrun for every attempt.",
    )
    preload: Annotated[tuple[ModuleName, ...], BeforeValidator(as_list)] = Field(
        default=(), description="More modules for the warm launcher to import before it forks."
    )
    spares: CountOrZero = Field(
        default=0,
        description="Processes kept past the script's imports (past its setup(), where it calls "
        "autoglm.launch) to become ranks when some have failed; as many as ranks, or it is of "
        "little use. Each takes the memory of what it has built.",
    )
    checkpoint: Checkpoint = Field(description="Where, when and how many.")
    heartbeat: Heartbeat = Field(
        default_factory=Heartbeat, description="When a silent rank counts as hung."
    )
    restart: Restart = Field(default_factory=Restart, description="What follows a failure.")
    preemption: Preemption = Field(
        default_factory=Preemption, description="What follows a request to stop."
    )
    guards: Guards = Field(default_factory=Guards, description="What must hold before a start.")
    logs: Logs = Field(default_factory=Logs, description="What the console shows.")
    slurm: SlurmOptions = Field(
        default_factory=SlurmOptions, description="What `autoglm slurm submit` asks Slurm for."
    )
    notify: Annotated[tuple[Notice, ...], BeforeValidator(as_list)] = Field(
        default=(), description="Who is told when the state of the run changes."
    )

    @field_validator("module")
    @classmethod
    def _script_or_module(cls, module: str | None, info: ValidationInfo) -> str | None:
        if "script" in info.data and (module is None) == (info.data["script"] is None):
            raise problem(
                "missing: give script or module"
                if module is None
                else "script and module are both given, and only one can run"
            )
        return module

    @field_validator("env")
    @classmethod
    def _usable_port(cls, env: dict[str, str]) -> dict[str, str]:
        port = env.get("MASTER_PORT", "1")
        if not (port.isdecimal() and 1 <= int(port) <= 65535):
            raise problem(f"expected MASTER_PORT from 1 to 65535, found {port!r}")
        return env

    @field_validator("preload", "spares")
    @classmethod
    def _only_warm(cls, asked: Any, info: ValidationInfo) -> Any:
        if asked and info.data.get("launcher") == "torchrun":
            raise problem("only the warm launcher does that, and launcher is torchrun")
        return asked


def dump(job: Job) -> dict[str, Any]:
    """`job` as JSON values, durations and sizes readable; `load` and `from_snapshot` take it."""
    return job.model_dump(mode="json", by_alias=True)


def shown(job: Job) -> dict[str, Any]:
    """`dump`, less what nobody should read in a journal or on a screen."""
    return secret.shown(dump(job))


def sections() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The known keys of the job file and of each of its sections, by path."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}

    def visit(section: type[Section], path: tuple[str, ...]) -> None:
        found[path] = tuple(section.keys())
        for name, inner in section.keys().items():
            if inner is not None:
                visit(inner, (*path, name))

    visit(Job, ())
    return found


class _EditorSchema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:
        return False  # a title that repeats the key is noise in an editor


def json_schema() -> JsonSchemaValue:
    """The JSON Schema of a job file, for editors."""
    schema = Job.model_json_schema(schema_generator=_EditorSchema)
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # `load` fills in the fields that have no default
        for field in section["properties"].values():
            readable = {
                units.DURATION_PATTERN: units.format_duration,
                units.SIZE_PATTERN: units.format_size,
            }.get(field.get("pattern"))
            if readable and "default" in field:
                field["default"] = readable(field["default"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "autoglm job file",
        "patternProperties": {f"^{ASIDE}": {}},
        "oneOf": [{"required": ["script"]}, {"required": ["module"]}],
    }
