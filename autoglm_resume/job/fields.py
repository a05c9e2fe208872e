"""What a single field of a job may hold, and how a refusal reads.

Every check comes before pydantic's own, so that each message is a sentence in a person's words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from autoglm_resume.checkpoint.storage.address import AN_ADDRESS, bucket_at
from autoglm_resume.job import units

Parsed = TypeVar("Parsed")

SET_BY_AUTOGLM: Final = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
    }
)
PREFIXES_SET_BY_AUTOGLM: Final = ("TORCHELASTIC_", "AUTOGLM_")
LONGEST_NAME: Final = 100


def found(value: object) -> str:
    """`value` as a person would say it in “expected …, found …”."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        text = value if len(value) <= 60 else value[:57] + "..."
        is_number = value.replace(".", "", 1).isdecimal()
        return f"the text {text!r}" if is_number else repr(text)
    return str(value)


def problem(message: str) -> PydanticCustomError:
    """A refusal that already reads as a sentence; pydantic only adds where it happened."""
    return PydanticCustomError("job", "{message}", {"message": message})


def expected(what: str, value: object) -> PydanticCustomError:
    return problem(f"expected {what}, found {found(value)}")


def whole_number(minimum: int, maximum: int | None = None) -> BeforeValidator:
    words = f"≥ {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise expected(f"a whole number {words}", value)
        if maximum is not None and value > maximum:
            raise expected(f"a whole number {words}", value)
        return value

    return BeforeValidator(check)


def one_of(*choices: str) -> BeforeValidator:
    *first, last = choices
    words = f"{', '.join(first)} or {last}"

    def check(value: object) -> object:
        if value is False and "off" in choices:  # an unquoted `off` is a boolean in YAML 1.1
            return "off"
        if value not in choices:
            raise expected(words, value)
        return value

    return BeforeValidator(check)


def _parsed_by(parse: Callable[[object], Parsed], what: str) -> Callable[[object], Parsed]:
    def check(value: object) -> Parsed:
        try:
            return parse(value)
        except ValueError:
            raise expected(what, value) from None

    return check


def _positive_duration(value: object) -> float:
    seconds = units.parse_duration(value)
    if not seconds:
        raise ValueError("zero")
    return seconds


def _text(value: object) -> str:
    if isinstance(value, bool):
        raise problem(f"expected text, found {found(value)}; quote it if you mean the word")
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise expected("text", value)
    if "\0" in value:
        raise problem("holds a NUL character, which no argument or variable can")
    return value


def as_variable(value: object) -> str:
    name = _text(value)
    if not name or "=" in name:
        raise problem("is no name for an environment variable")
    if name in SET_BY_AUTOGLM or name.startswith(PREFIXES_SET_BY_AUTOGLM):
        raise problem("autoglm sets it for every rank, the job cannot")
    return name


def _path(value: object) -> object:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise expected("a path", value)
    if "\0" in value:
        raise problem("holds a NUL character, which no path can")
    return value


def _module(value: object) -> str:
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")):
        raise expected("the dotted name of a module", value)
    if value == "__main__":
        raise problem("__main__ is the running program, not a module that can be imported")
    return value


def as_word(value: object) -> str:
    text = _text(value)
    if not text or text != text.strip() or not text.isprintable():
        raise expected("a name", value)
    return text


def as_name(value: object) -> str:
    name = _text(value)
    plain = name.isprintable() and "/" not in name and not name.startswith((".", "-"))
    if not name or not plain or name != name.strip() or len(name.encode()) > LONGEST_NAME:
        raise expected("a plain file name, since the run directory is called so", value)
    return name


def as_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise expected("true or false", value)
    return value


def as_replica(value: object) -> str:
    text = _text(value)
    try:
        bucket = bucket_at(text)
    except ValueError as error:
        raise expected(str(error), value) from None
    if bucket is None and not text.startswith("/"):
        raise expected(AN_ADDRESS, value)
    return text.rstrip("/") or text


def as_processes(value: object) -> object:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise expected("auto or a whole number ≥ 1", value)
    return value


def as_list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise expected("a list", value)
    return value


def as_mapping(value: object) -> object:
    if not isinstance(value, Mapping):
        raise expected("a mapping", value)
    return value


_DURATION_SCHEMA: Final = {
    "type": ["string", "number"],
    "pattern": units.DURATION_PATTERN,
    "minimum": 0,
    "examples": ["500ms", "90s", "10m", "2h", "1h30m"],
}
_SIZE_SCHEMA: Final = {
    "type": ["string", "integer"],
    "pattern": units.SIZE_PATTERN,
    "minimum": 0,
    "examples": ["4GiB", "500MB"],
}
_DURATION_WORDS: Final = "a duration such as 500ms, 90s, 10m or 1h30m"


def _one_machine(nodes: int) -> int:
    if nodes > 1:
        raise problem(
            f"expected 1, found {nodes}: this version runs on one machine, "
            "several nodes come with a later one"
        )
    return nodes


def _duration_or_auto(value: object) -> float | Literal["auto"]:
    return "auto" if value == "auto" else _positive_duration(value)


def _written(period: float | Literal["auto"]) -> str | float:
    return "auto" if period == "auto" else units.format_duration(period)


Count = Annotated[int, Field(ge=1), whole_number(1)]
OneMachine = Annotated[Count, AfterValidator(_one_machine)]
CountOrZero = Annotated[int, Field(ge=0), whole_number(0)]
Duration = Annotated[
    float,
    BeforeValidator(_parsed_by(units.parse_duration, _DURATION_WORDS)),
    PlainSerializer(units.format_duration, when_used="json"),
    WithJsonSchema(_DURATION_SCHEMA),
]
PositiveDuration = Annotated[
    float,
    BeforeValidator(_parsed_by(_positive_duration, f"{_DURATION_WORDS}, longer than 0")),
    PlainSerializer(units.format_duration, when_used="json"),
    WithJsonSchema(_DURATION_SCHEMA),
]
Period = Annotated[
    float | Literal["auto"],
    BeforeValidator(_parsed_by(_duration_or_auto, f"auto, or {_DURATION_WORDS}, longer than 0")),
    PlainSerializer(_written, when_used="json"),
    WithJsonSchema({"anyOf": [{"const": "auto"}, _DURATION_SCHEMA]}),
]
Size = Annotated[
    int,
    BeforeValidator(_parsed_by(units.parse_size, "a size such as 500MB or 4GiB")),
    PlainSerializer(units.format_size, when_used="json"),
    WithJsonSchema(_SIZE_SCHEMA),
]
Flag = Annotated[bool, BeforeValidator(as_flag)]
Word = Annotated[str, BeforeValidator(as_word)]
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema({"type": ["string", "number"]})]
ModuleName = Annotated[str, BeforeValidator(_module)]
FilePath = Annotated[Path, BeforeValidator(_path), WithJsonSchema({"type": "string"})]
Strictness = Annotated[Literal["strict", "lenient", "off"], one_of("strict", "lenient", "off")]
Switch = Annotated[Literal["strict", "off"], one_of("strict", "off")]
