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
  autoglm logs --attempt all         from the first attempt on
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
        str | None,
        typer.Option("--attempt", metavar="K|all", help="Of this attempt, not the newest."),
    ] = None,
) -> int:
    """Print what the ranks printed."""
    from autoglm_resume.cli import target
    from autoglm_resume.errors import UsageError
    from autoglm_resume.observe import logs as view

    if attempt not in (None, "all") and not (attempt.isascii() and attempt.isdecimal()):
        raise UsageError(f"--attempt {attempt}: expected the number of an attempt, or all")
    found = target.run(run)
    number = None if attempt in (None, "all") else int(attempt)
    if attempt == "all":
        view.show_earlier(found, rank)
    (view.follow if follow else view.show)(found, rank, number)
    return 0
