"""`autoglm logs`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume.cli.arguments import Run

EXAMPLES = """
\b
Examples:
  autoglm logs                       the newest attempt of the newest run, all ranks
  autoglm logs -f                    as they grow, from attempt to attempt
  autoglm logs runs/quickstart --rank 1 --attempt 0
"""


def logs(
    run: Run = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as they grow, until the run ends.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, metavar="N", help="Only of this rank.")
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", min=0, metavar="K", help="Of this attempt, not the newest."),
    ] = None,
) -> int:
    """Print what the ranks printed."""
    from autoglm_resume.cli import target
    from autoglm_resume.observe import logs as view

    (view.follow if follow else view.show)(target.run(run), rank, attempt)
    return 0
