"""`autoglm schema`."""

from __future__ import annotations

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm schema > job.schema.json
\b
Then begin a job file with this line, for editors that speak YAML:
  # yaml-language-server: $schema=job.schema.json
"""


def schema() -> int:
    """Print the JSON Schema of job files. Editors complete and check them with it."""
    from autoglm_resume.job.spec import json_schema

    output.document(json_schema())
    return 0
