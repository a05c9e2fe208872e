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
"""


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            show_default=False,
            help="A checkpoint, a directory of them, or a run directory (then the newest).",
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
) -> int:
    """Write a checkpoint as safetensors, torch or DCP.

    Every byte is verified. Sharded tensors are put together; where ranks differ, keys begin with
    rank0/. `autoglm import` makes the same checkpoint of it again. It takes as much memory as the
    checkpoint has bytes.
    """
    from pathlib import Path

    from autoglm_resume.errors import UsageError
    from autoglm_resume.observe import inspection
    from autoglm_resume.observe.progress import Progress
    from autoglm_resume.observe.pure.say import size

    found = inspection.find(Path(what))
    if not found.paths:
        raise UsageError(f"{found.store.root}: no checkpoint there yet")
    path, target = found.paths[0], Path(out)

    from autoglm_resume.checkpoint.interop import formats
    from autoglm_resume.checkpoint.interop.gather import gather

    formats.check(to, target)
    total = found.store.load_manifest(path).raw
    with Progress(f"exporting {path.name}", 2 * total) as progress:
        content = gather(found.store, path, progress)
        formats.write(to, target, content)
    output.show(f"{out}: {path.name}, {len(content.tensors)} tensors, {size(content.nbytes)}")
    return 0
