"""`autoglm ckpts`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm ckpts                          the newest run from here
  autoglm ckpts runs/quickstart
  autoglm ckpts /backup/checkpoints --json | jq '.checkpoints[] | select(.accepted) | .id'
"""


def ckpts(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|DIR",
            show_default=False,
            help="A run directory, a job file, or a directory of checkpoints.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """List checkpoints: sizes, chain, why each is kept, verdict.

    `stored` is what a checkpoint takes on disk; `shared` is what it refers to in older ones.
    """
    import sys
    import time

    from autoglm_resume.cli import target
    from autoglm_resume.observe import inspection, listing
    from autoglm_resume.observe.tables import width

    found = inspection.find_all(target.checkpoints(what))
    listed = listing.of(found, listing.keep_of(found.run), time.time())
    if json:
        output.document(listing.to_json(listed))
    else:
        inspection.show(listing.tables(listed, width(sys.stdout)))
    return 0
