"""`autoglm explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output
from autoglm_resume.cli.arguments import Run

EXAMPLES = """
\b
Examples:
  autoglm explain                       the newest run from here
  autoglm explain runs/quickstart --attempt 3
  autoglm explain job.yaml --json | jq '.attempts[].recovery | select(.) | .kind'
"""


def explain(
    run: Run = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=0, metavar="N", help="Only this attempt.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """Tell how a run is and, attempt by attempt, what happened.

    What failed first, where, what was concluded from it, what was done, and what it cost.
    """
    import sys

    from autoglm_resume.cli import target
    from autoglm_resume.observe import telling

    found = target.run(run)
    explained = telling.of(found, attempt)
    if json:
        output.document(telling.to_json(found.path, explained))
    else:
        telling.show(found.path, explained, sys.stdout)
    return 0
