"""`autoglm resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output
from autoglm_resume.cli.arguments import Run
from autoglm_resume.errors import UsageError

EXAMPLES = """
\b
Examples:
  autoglm resume                  the newest in ./runs, or the one from here
  autoglm resume runs/quickstart
  autoglm resume job.yaml         with what the file says now; the others, as they were started
  autoglm resume runs/quickstart --from 120     branches off there; newer checkpoints stay
  autoglm resume --all runs       every run there that was interrupted or died; made for cron
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
    every: Annotated[
        bool,
        typer.Option("--all", help="Continue what goes on by itself of all runs in a directory."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="End with one JSON document on standard output.")
    ] = False,
) -> int:
    """Continue an interrupted run. Nothing is done on a finished one."""
    if every:
        return _all(run, step, json=json)
    from autoglm_resume.cli import target
    from autoglm_resume.observe import report
    from autoglm_resume.observe.live import Screen
    from autoglm_resume.supervise import start

    found = target.run(run, acts=True)
    job = target.job(run)
    console = job.logs.console if job else found.section("logs").get("console", "all")
    screen = Screen(console, json=json)
    with report.afterwards(found.path, screen, json=json):
        if job is not None:
            return start.start(job, screen, branch_from=step)
        return start.resume(found.path, screen, step)


def _all(directory: str | None, step: int | None, *, json: bool) -> int:
    import sys
    from dataclasses import asdict
    from pathlib import Path

    from autoglm_resume.cli import target
    from autoglm_resume.supervise import resume_all
    from autoglm_resume.supervise.base.run_directory import RunDirectory

    if step is not None:
        raise UsageError("--all and --from exclude each other: a step is of one run")
    place = Path(directory or target.RUNS)
    if not place.is_dir():
        raise UsageError(f"{place}: expected a directory of runs")
    if RunDirectory(place).exists:
        raise UsageError(
            f"{place}: expected a directory of runs, found a run",
            hint=f"continue it alone with: autoglm resume {place}; or name the directory it is in",
        )
    ended: list[resume_all.Fate] = []

    def tell(one: resume_all.Fate) -> None:
        ended.append(one)
        if not json:
            output.show(f"{one.run.name}: {one.text}")
            sys.stdout.flush()

    runs = target.runs(place)
    code = resume_all.resume(runs, tell)
    if not runs and not json:
        output.show(f"{place}: no run there")
    if json:
        output.document([{**asdict(one), "run": str(one.run)} for one in ended])
    return code
