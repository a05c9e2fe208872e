"""Arguments that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        show_default=False,
        help="A run directory, a name of `autoglm runs`, or a job file. Default: the newest in "
        "./runs or started from here.",
    ),
]
"""Resolved by `target.run`."""

LivingRuns = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|DIR]...",
        show_default=False,
        help="Runs, or directories of runs: all in them that are running. Default: the only one "
        "in ./runs or started from here that is running.",
    ),
]
"""Resolved by `several.living`."""

Yes = Annotated[bool, typer.Option("--yes", help="All runs of a directory, without asking.")]
