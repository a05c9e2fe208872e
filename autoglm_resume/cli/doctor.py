"""`autoglm doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm doctor
  autoglm doctor job.yaml && autoglm run job.yaml
  autoglm doctor job.yaml --json | jq '.[] | select(.verdict != "ok")'
"""


def doctor(
    job_file: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB.yaml",
            show_default=False,
            help="A job file. Default: the machine itself, and the current directory.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """Check this machine before a run, and say what to do.

    GPUs, memory, disk, storage, limits, versions, and a collective round among ranks.

    Exits 1 if something is wrong. Nothing is changed and nothing ended.
    """
    from autoglm_resume.job.load import load
    from autoglm_resume.observe import doctor as view

    findings = view.examine(load(job_file) if job_file is not None else None)
    if json:
        output.document(view.to_json(findings))
    else:
        view.show(findings)
    return view.code(findings)
