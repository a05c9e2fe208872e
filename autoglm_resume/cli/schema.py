"""`autoglm schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm schema > job.schema.json
  autoglm schema --markdown
\b
Then begin a job file with this line, for editors that speak YAML:
  # yaml-language-server: $schema=job.schema.json
"""


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a page to read, all fields in tables.")
    ] = False,
) -> int:
    """Print the JSON Schema of job files. Editors complete and check them with it."""
    from autoglm_resume.job.spec import json_schema

    if markdown:
        from autoglm_resume.job import reference

        output.verbatim(reference.markdown(json_schema()))
    else:
        output.document(json_schema())
    return 0
