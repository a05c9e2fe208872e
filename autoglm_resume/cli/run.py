"""`autoglm run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from autoglm_resume.protocol.assignment import Beginning

EXAMPLES = """
\b
Examples:
  autoglm run job.yaml
  autoglm run job.yaml --set checkpoint.every.steps=50 --set nproc_per_node=2
  autoglm run job.yaml -- --lr 0.1
  autoglm run train.py -- --lr 0.1
  autoglm run tune.yaml --init-from runs/pretrain --only model
  autoglm run job.yaml --dry-run
  autoglm run job.yaml --drill kill:rank=1,step=30
  autoglm run job.yaml --drill random:seed=7,every=20s
"""


def run(
    context: typer.Context,
    job_file: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.yaml",
            help="The job file; or the script alone, which then runs from here as train.py does.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a field (args.1=0.2: in a list); repeatable.",
        ),
    ] = None,
    drills: Annotated[
        list[str] | None,
        typer.Option(
            "--drill",
            metavar="SPEC",
            help="Rehearse a failure: kill, stop, exit, corrupt:latest, random, none; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, start nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of continuing an earlier run.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="CKPT",
            help="Begin a new run, at step 0, with the objects of this checkpoint, or of the "
            "newest of a run.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="OBJECT", help="With --init-from: this one alone; repeatable."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="End with one JSON document on standard output.")
    ] = False,
) -> int:
    """Train: start the job, or continue it where it stopped.

    What stands behind -- is given to the script, behind the arguments that the job has.
    """
    from autoglm_resume.cli.light import REST
    from autoglm_resume.job.load import load
    from autoglm_resume.observe import plan, report
    from autoglm_resume.observe.live import Screen
    from autoglm_resume.supervise import start

    job = load(job_file, overrides or (), context.meta[REST])
    begins = _beginning(source, only or ())
    if dry_run:
        return plan.show(
            start.plan(job, fresh=fresh, drills=drills or (), begins=begins), json=json
        )
    screen = Screen(job.logs.console, json=json)
    with report.afterwards(job.run_dir, screen, json=json):
        return start.start(job, screen, fresh=fresh, drills=drills or (), begins=begins)


def _beginning(source: str | None, only: Sequence[str]) -> Beginning | None:
    from autoglm_resume.cli import target
    from autoglm_resume.errors import UsageError
    from autoglm_resume.observe import inspection
    from autoglm_resume.supervise import start

    if source is None:
        if only:
            raise UsageError("--only needs --init-from: it names what is taken from there")
        return None
    found = inspection.find(target.checkpoints(source))
    if not found.paths:
        raise UsageError(f"{found.store.root}: no checkpoint there yet")
    return start.beginning(found.paths[0].resolve(), only)
