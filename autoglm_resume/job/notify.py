"""The `notify` section of a job: who is told of what."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from autoglm_resume.job.fields import Text, as_list, expected, one_of, problem
from autoglm_resume.job.section import Section

Occasion = Literal[
    "started",
    "failed",
    "recovered",
    "paused",
    "straggler",
    "completed",
    "interrupted",
    "gave_up",
    "died",
]
_DEFAULT: tuple[Occasion, ...] = (
    *("failed", "recovered", "paused"),
    *("completed", "interrupted", "gave_up", "died"),
)
_ADDRESS = re.compile(r"(https?://[^\s/]+\S*|\$\w+|\$\{\w+\})")


def _webhook(value: object) -> str:
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise problem("expected https://… or $VARIABLE that holds it (it is not repeated here)")
    return value


def _command(value: object) -> object:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple) and value:
        return value
    raise expected("a command such as [mail, -s, training, me] or a line for sh", value)


class Notice(Section):
    """One who is told: a webhook, or a command."""

    webhook: Annotated[str, BeforeValidator(_webhook)] | None = Field(
        default=None,
        description="Where the JSON body is posted; `$VARIABLE` is read from the environment when "
        "a message is sent, and keeps the address out of the files of the run.",
    )
    command: Annotated[tuple[Text, ...] | Text, BeforeValidator(_command)] | None = Field(
        default=None,
        validate_default=True,
        description="What gets the JSON body on standard input: a list, or a line for `sh`.",
    )
    on: Annotated[
        tuple[Annotated[Occasion, one_of(*get_args(Occasion))], ...], BeforeValidator(as_list)
    ] = Field(
        default=_DEFAULT,
        description="Of what: `started`, `failed` (an attempt), `recovered` (training again), "
        "`paused`, `straggler`, `completed`, `interrupted`, `gave_up`, `died` (the supervisor). "
        "Default: all but `started` and `straggler`.",
    )

    @field_validator("command")
    @classmethod
    def _one_of_both(cls, command: Any, info: ValidationInfo) -> Any:
        if "webhook" in info.data and (command is None) == (info.data["webhook"] is None):
            raise problem(
                "missing: give webhook or command"
                if command is None
                else "webhook and command are both given: make two entries of them"
            )
        return command
