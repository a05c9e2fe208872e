"""`autoglm status`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm status                  the newest run from here
  autoglm status runs             all runs in a directory, one line each
  autoglm status job.yaml --json | jq .goodput
"""


def status(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|DIR",
            show_default=False,
            help="A run directory, a job file, or a directory of runs.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """Show how a run is doing: ranks, failures, goodput, replicas."""
    from autoglm_resume.cli import target
    from autoglm_resume.observe import status as view

    runs = target.runs_in(what)
    if runs:
        found = view.of_all(runs)
        if json:
            output.document([view.to_json(one) for one in found])
        else:
            view.show_all(found)
        return 0
    one = view.of(target.run(what))
    if json:
        output.document(view.to_json(one))
    else:
        view.show(one)
    return 0
