"""`autoglm verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm verify                             the newest run from here
  autoglm verify runs/quickstart
  autoglm verify /backup/checkpoints --json
"""


def verify(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|DIR",
            show_default=False,
            help="A run directory, a job file, a checkpoint, or a directory of checkpoints.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """Read every byte of every checkpoint. Exits 0 if all are good, 1 if some, 90 if none."""
    from autoglm_resume.cli import target
    from autoglm_resume.errors import NoAcceptableCheckpoint
    from autoglm_resume.observe import inspection
    from autoglm_resume.observe.progress import Progress

    found = inspection.find(target.checkpoints(what))
    if not found.paths:
        raise NoAcceptableCheckpoint(
            f"{found.store.root}: expected a checkpoint to verify, found none"
            + (f" but {len(kept)} in quarantine" if (kept := found.store.quarantined()) else "")
        )
    with Progress("verifying", inspection.stored_bytes(found, found.paths)) as progress:
        verdicts = inspection.verdicts(found, inspection.expectation(found.run), progress)
    if json:
        output.document([verdict.to_json() for verdict in verdicts])
    else:
        inspection.show([inspection.verdicts_table(verdicts)])
    return inspection.exit_code(verdicts)
