"""`autoglm stop`."""

from __future__ import annotations

from autoglm_resume import output
from autoglm_resume.cli.arguments import Run

EXAMPLES = """
\b
Examples:
  autoglm stop                    the newest in ./runs, or the one from here
  autoglm stop runs/quickstart
  autoglm resume runs/quickstart  goes on from there
"""


def stop(
    run: Run = None,
) -> int:
    """Ask a run to save and stop, and wait until it has."""
    from autoglm_resume.cli import target
    from autoglm_resume.control import stopping

    found = target.run(run, acts=True)
    holder = found.holder()
    if holder is None:
        output.show(f"{found.path}: not running")
        return 0
    stopping.stop(found, holder)
    output.show(stopping.outcome(found))
    return 0
