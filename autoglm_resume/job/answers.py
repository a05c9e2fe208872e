"""`restart.on` and `restart.window`: which failures the job answers in a way of its own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from autoglm_resume.errors import DoNotRequeue
from autoglm_resume.failures import Answer, Kind
from autoglm_resume.job.fields import Count, PositiveDuration, expected, found, problem
from autoglm_resume.job.section import Section

_PATTERN: Final = r"^/.+/$"
_CODE: Final = r"^[1-9][0-9]{0,2}$"
_UNANSWERED: Final = (Kind.STOPPED, Kind.USAGE_ERROR)
_KINDS: Final = tuple(kind.value for kind in Kind if kind not in _UNANSWERED)
"""A stop by a person is no failure, and what is refused once is refused always."""
_ANSWERS: Final = tuple(answer.value for answer in Answer)
_EITHER_WAY: Final = (Answer.RESTART, Answer.STOP)


class Window(Section):
    """More failures than this are not worth it, whatever progress there is in between."""

    failures: Count = Field(default=100, description="As many failures are not too many yet.")
    within: PositiveDuration = Field(
        default=3600.0, validate_default=True, description="In so much time up to now."
    )


def _trigger(value: object) -> str:
    """A failure class, an exit code, or a /pattern/."""
    text = str(value)
    if re.match(_PATTERN, text):
        try:
            re.compile(text[1:-1])
        except re.error as error:
            raise problem(f"is no regular expression: {error}") from None
    elif text.isdecimal():
        if not 1 <= int(text) <= 255 or not re.match(_CODE, text):
            raise problem("is no exit code of a failure: expected one from 1 to 255")
        if int(text) == DoNotRequeue.exit_code:
            raise problem("exit code 93 always ends the run")
    elif text not in _KINDS:
        raise problem(
            "is no failure class, exit code or /pattern/"
            + (_meant(text, _KINDS) or f"; the classes are {', '.join(_KINDS)}")
        )
    return text


@dataclass(frozen=True)
class _Unfit:
    """An answer that there is, but not to this."""

    answer: object


def _answer(value: object) -> Answer:
    if isinstance(value, _Unfit):
        raise problem(
            f"expected restart or stop, found {found(value.answer)}: the gate itself takes the "
            "next checkpoint"
        )
    if isinstance(value, Answer):
        return value
    if value not in _ANSWERS:
        *first, last = _ANSWERS
        near = _meant(value, _ANSWERS)
        raise problem(f"expected {', '.join(first)} or {last}, found {found(value)}{near}")
    return Answer(value)


def _meant(wrong: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(wrong), known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _sensible(value: object) -> object:
    if not isinstance(value, Mapping):
        raise expected("a mapping such as {cuda_oom: stop, 17: requeue}", value)
    refused = value.get(Kind.REFUSED.value)
    if refused in _ANSWERS and Answer(refused) not in _EITHER_WAY:
        # Refused in its turn, so that other problems are told too.
        return {**value, Kind.REFUSED.value: _Unfit(refused)}
    return value


On = Annotated[
    dict[
        Annotated[str, BeforeValidator(_trigger)],
        Annotated[
            Answer,
            BeforeValidator(_answer),
            PlainSerializer(lambda answer: answer.value, when_used="json"),
        ],
    ],
    BeforeValidator(_sensible),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {
                "anyOf": [{"enum": list(_KINDS)}, {"pattern": _CODE}, {"pattern": _PATTERN}]
            },
            "additionalProperties": {"enum": list(_ANSWERS)},
        }
    ),
]
