"""The reference page of job files, made from their JSON Schema: docs/job-file.md."""

from __future__ import annotations

import json
from typing import Any

from autoglm_resume.job.units import DURATION_PATTERN, SIZE_PATTERN

_KEYS = ("name of a class of failures", "an exit code", "`/pattern/`")


def markdown(schema: dict[str, Any]) -> str:
    """Every field, its type, default and meaning; a table for the job and one for each section."""
    sections = schema["$defs"]
    lines = [
        "# Job files",
        "",
        "Made by `autoglm schema --markdown` from the schema that job files are checked with.",
        schema["description"],
        "`script` or `module` is needed, everything else has a default. Keys that begin with `x-` "
        "are yours.",
        "",
        *_table(schema, sections),
    ]
    for name, path in _paths(schema, sections).items():
        section = sections[name]
        lines += [f"## {path}", "", section["description"], "", *_table(section, sections)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _paths(schema: dict[str, Any], sections: dict[str, Any]) -> dict[str, str]:
    """Where each section is in a job file, in the order in which one comes upon them."""
    found: dict[str, str] = {}

    def look(section: dict[str, Any], at: str) -> None:
        for key, field in section["properties"].items():
            for name in _references(field):
                if name not in found:
                    found[name] = f"{at}{key}"
                    look(sections[name], f"{at}{key}.")

    look(schema, "")
    return found


def _references(field: object) -> list[str]:
    if isinstance(field, list):
        return [name for each in field for name in _references(each)]
    if not isinstance(field, dict):
        return []
    own = [field["$ref"].rpartition("/")[2]] if "$ref" in field else []
    return own + [name for key in ("anyOf", "items") for name in _references(field.get(key))]


def _table(section: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    rows = ["| key | | default | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        means = field.get("description", "")
        if not means and (names := _references(field)):
            means = sections[names[0]]["description"]
        default = _value(field["default"]) if field.get("default") is not None else ""
        cells = (f"`{key}`", _kind(field), default, means)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*rows, ""]


def _kind(field: dict[str, Any]) -> str:
    """What a value is, in words."""
    if "anyOf" in field:
        kinds = [_kind(each) for each in field["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "$ref" in field:
        return "section"
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        return ", ".join(map(_value, field["enum"]))
    match field.get("pattern"):
        case units if units == DURATION_PATTERN:
            return "duration"
        case units if units == SIZE_PATTERN:
            return "size"
    match field.get("type"):
        case "array":
            return f"list of {_kind(field['items'])}"
        case "object":
            of = field.get("additionalProperties")
            key = ", ".join(_KEYS) if "propertyNames" in field else "name"
            return f"mapping: {key} to {_kind(of)}" if isinstance(of, dict) else "mapping"
        case "integer":
            return "whole number" + (f" from {field['minimum']}" if "minimum" in field else "")
        case "boolean":
            return "`true`, `false`"
        case list(kinds):
            return " or ".join("text" if kind == "string" else str(kind) for kind in kinds)
        case "string":
            return "text"
        case kind:
            return str(kind)


def _value(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
