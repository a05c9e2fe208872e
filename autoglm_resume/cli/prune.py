"""`autoglm prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output
from autoglm_resume.cli.arguments import Yes

EXAMPLES = """
\b
Examples:
  autoglm prune runs/quickstart --dry-run
  autoglm prune runs/quickstart --keep 1
  autoglm prune runs --yes               all runs there, without a question
  autoglm prune /backup/checkpoints --keep '{last: 1, every_steps: 1000, for: 2d}'
"""


def prune(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|DIR]...",
            show_default=False,
            help="Runs, directories of checkpoints, or directories of runs: all in them.",
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
    yes: Yes = False,
) -> int:
    """Delete the checkpoints that no rule keeps.

    The newest good one, the newest that counts by checkpoint.commit, the one that was accepted
    last, whatever a kept one refers to, and whatever the gate would reject now always stay; so do
    the best ones of the job, unless --keep names others. What a branch has left behind goes.
    Refuses (76) while a supervisor has the run.
    """
    import time
    from pathlib import Path

    from autoglm_resume.cli import several
    from autoglm_resume.control import pruning
    from autoglm_resume.observe import inspection, listing

    paths = several.checkpoints(what or (), "prune", sure=yes or dry_run)
    asked = None
    if keep is not None:
        from autoglm_resume.job.load import keep_option

        asked = keep_option(keep)

    def one(path: Path) -> None:
        found = inspection.find_all(path)
        rules = pruning.rules(found, asked)
        if dry_run:
            listed = listing.of(found, rules, time.time(), pruning=True)
        else:
            listed = pruning.prune(found, rules)
        if len(paths) > 1:
            output.show(f"{path}:")
        pruning.show(listed, dry=dry_run)

    return several.each(paths, one)
