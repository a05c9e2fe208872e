"""`autoglm import`."""

from __future__ import annotations

from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm import model.safetensors runs/quickstart
  autoglm import model.pt job.yaml --step 0    the run that this job will start goes on from it
  autoglm import exported /backup/checkpoints --step 0
"""


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", show_default=False, help="What `autoglm export` has written."
        ),
    ],
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            show_default=False,
            help="A run directory or a job file, also of a run to come, or a directory of "
            "checkpoints (made if it is not there).",
        ),
    ],
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, show_default=False, help="Default: the step it was saved at."
        ),
    ] = None,
) -> int:
    """Make a checkpoint of what was exported.

    Every tensor must still have its digest; the objects have those of what was exported. If it is
    the newest, the next start of the run goes on from it. A directory of DCP is unpickled by torch,
    so only take it from who you trust; nothing else is unpickled.
    """
    from pathlib import Path

    from autoglm_resume.cli import target
    from autoglm_resume.observe.progress import Progress
    from autoglm_resume.observe.pure.say import size
    from autoglm_resume.supervise.base.run_directory import undisturbed

    store, run = target.to_import_into(directory)

    from autoglm_resume.checkpoint.interop import formats
    from autoglm_resume.checkpoint.interop.adopt import adopt

    content = formats.read(Path(source))
    with Progress("importing", 2 * content.raw) as progress, undisturbed(run, store.root):
        manifest = adopt(store, content, step, progress)
    there = store.directory(manifest.id)
    output.show(f"{there}: {size(manifest.raw)}, {manifest.world_size} ranks")
    return 0
