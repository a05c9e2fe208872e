"""The `checkpoint` section of a job: where, when, how, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationInfo, field_validator

from autoglm_resume.checkpoint.store import retention
from autoglm_resume.job.fields import (
    Count,
    FilePath,
    Flag,
    Period,
    PositiveDuration,
    Word,
    as_list,
    as_mapping,
    as_replica,
    expected,
    one_of,
    problem,
    whole_number,
)
from autoglm_resume.job.section import OrShort, Section


class Every(Section):
    """When to save: whenever one of the two has passed since the last save."""

    steps: Count | None = Field(
        default=None, description="Save after this many steps. Default: only `seconds` counts."
    )
    seconds: Period | None = Field(
        default=None,
        validate_default=True,
        description="Save after this much time; `auto` weighs what saves were measured to cost "
        "against how often this run fails (Young, Daly). Default: 5m if `steps` is not given.",
    )

    @field_validator("seconds")
    @classmethod
    def _some_policy(
        cls, seconds: float | Literal["auto"] | None, info: ValidationInfo
    ) -> float | Literal["auto"] | None:
        return 300.0 if seconds is None and info.data.get("steps") is None else seconds


class Best(Section):
    """The checkpoints with the best figures."""

    metric: Word = Field(
        default="loss",
        description="A figure that the script reports with the steps that are saved: "
        "`session.report(accuracy=…)`.",
    )
    n: Count = Field(default=1, description="How many of them to keep.")
    mode: Annotated[Literal["min", "max"], one_of("min", "max")] = Field(
        default="min", description="Whether small figures are good ones, or large."
    )


class Keep(Section):
    """Which good checkpoints to keep: those that any of these wants, and what they refer to."""

    last: Count = Field(default=3, description="This many of the newest.")
    every_steps: Count | None = Field(
        default=None, description="Those whose step is divisible by this, for ever."
    )
    best: Best | None = Field(
        default=None, description="Those with the best figures, whatever branch they are of."
    )
    for_: PositiveDuration | None = Field(
        default=None, alias="for", description="Those that are younger than this."
    )

    @property
    def rules(self) -> retention.KeepRules:
        """As retention takes it."""
        best = retention.KeepBest(**self.best.model_dump()) if self.best else None
        return retention.KeepRules(self.last, self.every_steps, best, self.for_)


def _every(value: object) -> object:
    if value == "auto":
        return {"seconds": "auto"}
    if not isinstance(value, Mapping):
        raise expected("auto or a mapping such as {steps: 500}", value)
    return value


def _keep(value: object) -> object:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise expected("a whole number ≥ 1 or a mapping such as {last: 3, for: 2d}", value)
    return {"last": value}


KeepOrCount = Annotated[Keep, BeforeValidator(_keep), OrShort({"type": "integer", "minimum": 1})]


def keep(written: object) -> retention.KeepRules:
    """What the value of `checkpoint.keep` means. Raises pydantic.ValidationError."""
    return TypeAdapter(KeepOrCount).validate_python(written).rules


class Checkpoint(Section):
    """Where checkpoints are, when and how they are made, which are kept."""

    dir: FilePath = Field(
        description="Directory of the checkpoints. Default: `checkpoints` in the run directory."
    )
    every: Annotated[Every, BeforeValidator(_every), OrShort({"const": "auto"})] = Field(
        default_factory=Every, description="When to save; `auto` stands for `{seconds: auto}`."
    )
    keep: KeepOrCount = Field(
        default_factory=Keep,
        description="Which good checkpoints to keep; a number stands for `{last: NUMBER}`. The "
        "newest, and the one that was accepted last, always stay.",
    )
    memory: Annotated[int, Field(ge=0, le=2), whole_number(0, 2)] = Field(
        default=2,
        description="Snapshots that each rank has room for in host memory. 2: training goes on "
        "while one is written, and a crash in the middle of the next leaves a whole one; 1: half "
        "the memory; 0: none, training waits until each checkpoint is written.",
    )
    on_busy: Annotated[Literal["skip", "wait"], one_of("skip", "wait")] = Field(
        default="skip",
        description="What becomes of a save that falls due while the last one is being written. "
        "One that was asked for, and the last of a run, always wait.",
    )
    on_error: Annotated[Literal["continue", "stop"], one_of("continue", "stop")] = Field(
        default="continue",
        description="Whether training goes on after a save that failed.",
    )
    timeout: PositiveDuration = Field(
        default=600.0, description="A save that takes longer counts as failed."
    )
    compress: Annotated[
        Literal["auto", "fast", "small", "off"], one_of("auto", "fast", "small", "off")
    ] = Field(
        default="auto",
        description="How hard to compress, always without loss. `auto`: `fast` where neither "
        "saving nor loading becomes slower by it than the storage is, else `off`; `small`: as hard "
        "as it pays; `fast`: what costs little; `off`: not.",
    )
    keyframe_every: Count = Field(
        default=8,
        description="A checkpoint never needs more than this many of its ancestors.",
    )
    rename: Annotated[dict[Word, Word], BeforeValidator(as_mapping)] = Field(
        default_factory=dict,
        description="New names, by the names that older checkpoints have: of parameters or of "
        "modules with all that is in them, as in the model's state dict (`layers.0`), or with the "
        "name it is tracked under in front (`model.layers.0`). A checkpoint that fits as it is is "
        "left as it is.",
    )
    strict: Flag = Field(
        default=True,
        description="Refuse a checkpoint whose parameters (after `rename`) are not exactly the "
        "model's; false loads those that fit by name and shape and lists the others. Where there "
        "are others, the state of optimizers, which know parameters by number only, is not loaded.",
    )
    skip: Annotated[tuple[Word, ...], BeforeValidator(as_list)] = Field(
        default=(),
        description="Objects, by the names they are tracked under, that start as the script makes "
        "them when a run goes on from a checkpoint of the time before this was asked for: "
        "`scheduler`; of an optimizer `optimizer.settings` is its learning rate and the like "
        "without its moments.",
    )
    replicas: Annotated[
        tuple[Annotated[str, BeforeValidator(as_replica)], ...], BeforeValidator(as_list)
    ] = Field(
        default=(),
        description="Where copies go: directories, `s3://bucket/prefix`, `gs://…` or `az://…`.",
    )
    commit: Annotated[Literal["local", "quorum", "all"], one_of("local", "quorum", "all")] = Field(
        default="local",
        description="Where a checkpoint must be to count: in `dir`, in most of `dir` and its "
        "`replicas`, or in all of them. The newest that counts is kept whatever `keep` says, and "
        "the end of a run waits up to a minute for its last one to count.",
    )

    @field_validator("rename")
    @classmethod
    def _different_names(cls, rename: dict[str, str]) -> dict[str, str]:
        names = list(rename.values())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise problem(f"two parameters cannot both become {twice!r}")
        return rename

    @field_validator("replicas")
    @classmethod
    def _elsewhere(cls, replicas: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        home = info.data.get("dir")
        for n, replica in enumerate(replicas):
            if replica in replicas[:n]:
                raise problem(f"{replica} is given twice")
            if home is not None and Path(replica).is_relative_to(home):
                raise problem(f"{replica} is in checkpoint.dir itself, where it protects nothing")
        return replicas

    @field_validator("commit")
    @classmethod
    def _has_replicas(cls, commit: str, info: ValidationInfo) -> str:
        if commit != "local" and not info.data.get("replicas", True):
            raise problem(f"{commit} needs checkpoint.replicas, and there are none")
        return commit
