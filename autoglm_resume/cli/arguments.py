"""Arguments that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        show_default=False,
        help="A run directory or a job file. Default: the newest in ./runs or started from here.",
    ),
]
"""Resolved by `target.run`."""
