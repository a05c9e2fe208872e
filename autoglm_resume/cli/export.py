"""`autoglm export`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm export runs/quickstart model.safetensors --to safetensors
  autoglm export runs/quickstart/checkpoints/step-0000000040.a0 state.pt --to torch
  autoglm export runs/quickstart exported --to dcp
  autoglm export runs/quickstart model.pt --to torch --only model     as its state_dict()
"""


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            show_default=False,
            help="A checkpoint, a directory of them, or a run (then the newest).",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="A new file, or a new directory for dcp.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="safetensors|torch|dcp", show_default=False, help="For which library."
        ),
    ],
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="OBJECT",
            show_default=False,
            help="Its state alone, such as that of the model, to be loaded without autoglm.",
        ),
    ] = None,
) -> int:
    """Write a checkpoint as safetensors, torch or DCP.

    Every byte is verified. Sharded tensors are put together; where ranks differ, keys begin with
    rank0/. `autoglm import` makes the same checkpoint of it again, unless it is --only one object.
    It takes as much memory as what is exported.
    """
    from pathlib import Path

    from autoglm_resume.cli import target as targets
    from autoglm_resume.errors import UsageError
    from autoglm_resume.observe import inspection
    from autoglm_resume.observe.progress import Progress
    from autoglm_resume.observe.pure.say import size

    found = inspection.find(targets.checkpoints(what))
    if not found.paths:
        raise UsageError(f"{found.store.root}: no checkpoint there yet")
    path, target = found.paths[0], Path(out)

    from autoglm_resume.checkpoint.dcp.paths import METADATA
    from autoglm_resume.checkpoint.interop import formats
    from autoglm_resume.checkpoint.interop.gather import gather

    formats.check(to, target)
    manifest = found.store.load_manifest(path)
    if only is not None and only not in manifest.objects and METADATA not in manifest.objects:
        there = ", ".join(sorted(manifest.objects))
        raise UsageError(f"{path.name}: no object {only!r}; there are {there}")
    with Progress(f"exporting {path.name}", 2 * manifest.raw) as progress:
        content = gather(found.store, path, progress, only=only)
        formats.write(to, target, content, only)
    output.show(f"{out}: {path.name}, {len(content.tensors)} tensors, {size(content.nbytes)}")
    return 0
