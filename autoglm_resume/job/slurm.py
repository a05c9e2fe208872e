"""The `slurm` section of a job: what `autoglm slurm submit` asks Slurm for."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from autoglm_resume.job.fields import (
    Count,
    FilePath,
    OneMachine,
    Text,
    as_list,
    as_word,
    expected,
)
from autoglm_resume.job.section import Section


def _option(text: str) -> str:
    if not text.startswith("-") or not text.isprintable():
        raise expected("an option of sbatch, such as --mem=64G", text)
    return text


Asked = Annotated[Text, AfterValidator(as_word)]


class SlurmOptions(Section):
    """What `autoglm slurm submit` asks for; its own options count more."""

    nodes: OneMachine = Field(
        default=1, description="Number of machines. This version runs on one."
    )
    gpus: Asked | None = Field(default=None, description="As sbatch has it: `4`, `a100:4`.")
    cpus: Count | None = Field(default=None, description="Cores, all of the one task.")
    time: Asked | None = Field(
        default=None, description="Time limit, as sbatch has it: `30` (minutes), `4:00:00`, `1-12`."
    )
    partition: Asked | None = Field(default=None, description="Where to run.")
    output: FilePath | None = Field(
        default=None,
        description="File for what the job prints, `%j` being its number; relative to the "
        "directory of the job file. Default: Slurm's.",
    )
    options: Annotated[
        tuple[Annotated[Text, AfterValidator(_option)], ...], BeforeValidator(as_list)
    ] = Field(default=(), description="More options of sbatch: `[--mem=64G, --account=me]`.")
