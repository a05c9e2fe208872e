"""`autoglm mv`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm mv runs/quickstart runs/baseline
  autoglm mv runs/quickstart /archive      into that directory
"""


def mv(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="A run directory, a name of `autoglm runs`, or a job file.",
        ),
    ],
    to: Annotated[
        str,
        typer.Argument(
            metavar="NEW", show_default=False, help="Its new place, or a directory to put it into."
        ),
    ],
) -> int:
    """Move a run's directory. All in it is found there, and the list of runs follows.

    Refuses (76) while a supervisor has the run.
    """
    from pathlib import Path

    from autoglm_resume.cli import target
    from autoglm_resume.control import moving

    found = target.run(run, acts=True)
    moved = moving.move(found, Path(to))
    output.show(f"{found.path}: now in {moved}")
    output.say(f"it goes on there with: {output.command('resume', output.near(moved))}")
    return 0
