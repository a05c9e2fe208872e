from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from autoglm_resume.job.spec import Job, json_schema, sections


def tables(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema["$defs"].values()]


def test_every_field_of_the_schema_is_described() -> None:
    for table in tables(json_schema()):
        for name, field in table["properties"].items():
            assert field.get("description", "").endswith("."), name


def test_the_schema_refuses_unknown_keys_and_demands_only_something_to_run() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert all(table["additionalProperties"] is False for table in tables(schema))
    assert not any("required" in table for table in tables(schema))
    assert schema["patternProperties"] == {"^x-": {}}
    assert schema["oneOf"] == [{"required": ["script"]}, {"required": ["module"]}]


def test_durations_and_sizes_are_text_or_number_in_the_schema() -> None:
    definitions = json_schema()["$defs"]
    timeout = definitions["Heartbeat"]["properties"]["timeout"]
    assert timeout["type"] == ["string", "number"]
    assert timeout["default"] == "5m"
    assert all(re.search(timeout["pattern"], each) for each in timeout["examples"])
    disk = definitions["Guards"]["properties"]["free_disk"]
    assert disk["default"] == "1GiB"
    assert all(re.search(disk["pattern"], each) for each in disk["examples"])


def test_every_section_is_known_by_its_path() -> None:
    assert sections()["checkpoint", "every"] == ("steps", "seconds")
    assert sections()[()] == tuple(Job.model_fields)


def test_sections_that_are_optional_or_named_by_a_keyword_are_known_too() -> None:
    assert sections()["checkpoint", "keep"] == ("last", "every_steps", "best", "for")
    assert sections()["checkpoint", "keep", "best"] == ("metric", "n", "mode")


def test_what_may_be_written_shorter_is_so_in_the_schema() -> None:
    fields = json_schema()["$defs"]["Checkpoint"]["properties"]
    assert fields["every"]["anyOf"] == [{"const": "auto"}, {"$ref": "#/$defs/Every"}]
    short, section = fields["keep"]["anyOf"]
    assert (short["type"], section) == ("integer", {"$ref": "#/$defs/Keep"})


def test_a_job_cannot_be_changed() -> None:
    job = Job.model_validate(
        {"name": "a", "script": "/a", "workdir": "/", "run_dir": "/r", "checkpoint": {"dir": "/c"}}
    )
    with pytest.raises(ValidationError):
        job.nnodes = 2  # type: ignore[misc]
