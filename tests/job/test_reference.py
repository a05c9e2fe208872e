from __future__ import annotations

from pathlib import Path

from autoglm_resume.job import reference
from autoglm_resume.job.spec import json_schema

PAGE = Path(__file__).parents[2] / "docs" / "job-file.md"


def test_the_reference_page_is_what_the_schema_says() -> None:
    made = reference.markdown(json_schema())
    assert PAGE.read_text() == made, "run: autoglm schema --markdown > docs/job-file.md"


def test_it_has_every_field_of_every_section_once() -> None:
    schema = json_schema()
    lines = reference.markdown(schema).splitlines()
    for section in (schema, *schema["$defs"].values()):
        for key, field in section["properties"].items():
            rows = [line for line in lines if line.startswith(f"| `{key}` |")]
            assert rows
            means = field.get("description", "").replace("|", "\\|")
            assert any(means in row for row in rows)
    assert len([line for line in lines if line.startswith("## ")]) == len(schema["$defs"])
