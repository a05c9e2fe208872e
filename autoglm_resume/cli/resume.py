"""`autoglm resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume.cli.arguments import Run

EXAMPLES = """
\b
Examples:
  autoglm resume                  the newest run under ./runs
  autoglm resume runs/quickstart
  autoglm resume job.yaml
  autoglm resume runs/quickstart --from 120     branches off there; newer checkpoints stay
"""


def resume(
    run: Run = None,
    step: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=0,
            metavar="STEP",
            help="Go on from this step's checkpoint, not the newest; `autoglm ckpts` lists them.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="End with one JSON document on standard output.")
    ] = False,
) -> int:
    """Continue an interrupted run. Nothing is done on a finished one."""
    from autoglm_resume.cli import target
    from autoglm_resume.observe import report
    from autoglm_resume.observe.live import Screen
    from autoglm_resume.supervise import start

    found = target.run(run)
    screen = Screen(found.job().get("logs", {}).get("console", "all"), json=json)
    with report.afterwards(found.path, screen, json=json):
        return start.resume(found.path, screen, step)
