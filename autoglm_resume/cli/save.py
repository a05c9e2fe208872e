"""`autoglm save`."""

from __future__ import annotations

from autoglm_resume import output
from autoglm_resume.cli.arguments import Run
from autoglm_resume.errors import AutoglmError

EXAMPLES = """
\b
Examples:
  autoglm save                    the newest in ./runs, or the one from here
  autoglm save runs/quickstart && autoglm ckpts runs/quickstart
"""


def save(
    run: Run = None,
) -> int:
    """Ask a run to save and go on, and wait for the commit."""
    from autoglm_resume.cli import target
    from autoglm_resume.control import saving

    found = target.run(run, acts=True)
    holder = found.holder()
    if holder is None:
        raise AutoglmError(
            f"{found.path}: not running, so there is nothing to save",
            hint=f"autoglm ckpts {found.path} lists what is saved",
        )
    saved = saving.save(found, holder)
    output.show(f"{found.path}: saved at step {saved.step} ({saved.id})")
    return 0
