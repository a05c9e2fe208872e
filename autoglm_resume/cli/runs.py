"""`autoglm runs`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm runs                    all of them, the last started first
  autoglm runs --json | jq -r '.[] | select(.state == "dead") | .run'
  autoglm status DIRECTORY        more about one of them
"""


def runs(
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """List the runs that you started, wherever they lie.

    Name, state, completed steps, when it was last started or continued, directory. A run leaves
    the list when its directory is gone.
    """
    from autoglm_resume.observe import all_runs

    found = all_runs.look()
    if json:
        output.document(all_runs.to_json(found))
    elif found:
        all_runs.show(found)
    else:
        output.say("no run yet; start one with: autoglm run JOB.yaml")
    return 0
