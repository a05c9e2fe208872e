"""`autoglm prune`."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """
\b
Examples:
  autoglm prune runs/quickstart --dry-run
  autoglm prune runs/quickstart --keep 1
  autoglm prune /backup/checkpoints --keep '{last: 1, every_steps: 1000, for: 2d}'
"""


def prune(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|DIR",
            show_default=False,
            help="A run directory, a job file, or a directory of checkpoints.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go and why, delete nothing.")
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="RULES",
            help="As checkpoint.keep of a job file. Default: what the job of the run says.",
        ),
    ] = None,
) -> int:
    """Delete the checkpoints that no rule keeps.

    The newest good one, the newest that counts by checkpoint.commit, the one that was accepted
    last, whatever a kept one refers to, and whatever the gate would reject now always stay; so do
    the best ones of the job, unless --keep names others. What a branch has left behind goes.
    Refuses (76) while a supervisor has the run.
    """
    import time

    from autoglm_resume.cli import target
    from autoglm_resume.control import pruning
    from autoglm_resume.observe import inspection, listing

    found = inspection.find_all(target.checkpoints(what, acts=True))
    asked = None
    if keep is not None:
        from autoglm_resume.job.load import keep_option

        asked = keep_option(keep)
    rules = pruning.rules(found, asked)
    if dry_run:
        listed = listing.of(found, rules, time.time(), pruning=True)
    else:
        listed = pruning.prune(found, rules)
    pruning.show(listed, dry=dry_run)
    return 0
