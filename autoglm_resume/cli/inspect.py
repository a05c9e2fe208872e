"""`autoglm inspect ckpt`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output
from autoglm_resume.errors import CheckpointError, UsageError

# PATH is no typer argument, because converting one would import pydantic (see light.py).
SETTINGS = {"allow_extra_args": True}
USAGE = "[OPTIONS] PATH"

EXAMPLES = """
\b
Examples:
  autoglm inspect ckpt runs/quickstart
  autoglm inspect ckpt runs/quickstart/checkpoints/step-0000000040.a0 --verify
  autoglm inspect ckpt runs/quickstart --tensors
  autoglm inspect ckpt runs/quickstart --json | jq .objects
"""


def ckpt(
    context: typer.Context,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte instead of trusting fingerprints.")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> int:
    """Show a checkpoint: manifest, parts, chain, and every verdict.

    Exits 90 if a check fails. PATH is a checkpoint, a directory of checkpoints, or a run directory
    (then the newest). Nothing is unpickled, so it is safe on files from anywhere.
    """
    from autoglm_resume.cli import target as targets
    from autoglm_resume.observe import inspection
    from autoglm_resume.observe.progress import Progress

    if len(context.args) != 1:
        raise UsageError(
            f"expected one PATH, found {len(context.args)}", hint="autoglm inspect ckpt --help"
        )
    target = inspection.find(targets.checkpoints(context.args[0]))
    if not target.paths:
        raise UsageError(f"{target.store.root}: no checkpoint there yet")
    expected = inspection.expectation(target.run)
    newest = target.paths[0]
    if verify:
        with Progress(
            f"verifying {newest.name}", inspection.stored_bytes(target, [newest])
        ) as progress:
            found = inspection.inspect(target, newest, expected, progress)
    else:
        found = inspection.inspect(target, newest, expected)
    others = [] if target.single else inspection.verdicts(target, expected)
    if json:
        document = inspection.to_json(found, tensors=tensors)
        if not target.single:
            document["all"] = [verdict.to_json() for verdict in others]
        output.document(document)
    else:
        listing = [inspection.verdicts_table(others)] if others else []
        inspection.show([*listing, *inspection.tables(found, tensors=tensors)])
    good = all(map(inspection.sound, (found.verdict, *others)))
    return 0 if good else CheckpointError.exit_code
