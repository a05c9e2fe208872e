"""`autoglm stop`."""

from __future__ import annotations

from autoglm_resume import output
from autoglm_resume.cli.arguments import LivingRuns, Yes

EXAMPLES = """
\b
Examples:
  autoglm stop                    the only running one from here
  autoglm stop runs/quickstart
  autoglm stop runs               all that are running there, after a question
  autoglm resume runs/quickstart  goes on from there
"""


def stop(
    runs: LivingRuns = None,
    yes: Yes = False,
) -> int:
    """Ask runs to save and stop, and wait until they have."""
    from contextlib import ExitStack

    from autoglm_resume.cli import several
    from autoglm_resume.control import stopping
    from autoglm_resume.supervise.base.run_directory import RunDirectory

    found = several.living(runs or (), "stop", sure=yes)
    with ExitStack() as held:
        ending = []

        def ask(run: RunDirectory) -> None:
            holder = run.holder()
            if holder is None:
                output.show(f"{run.path}: not running")
            else:
                ending.append((run, held.enter_context(stopping.asked(run, holder))))

        code = several.each(found, ask)
        for run, process in ending:
            stopping.wait(process)
            output.show(stopping.outcome(run))
    return code
