"""`autoglm save`."""

from __future__ import annotations

from autoglm_resume import output
from autoglm_resume.cli.arguments import LivingRuns, Yes
from autoglm_resume.errors import AutoglmError

EXAMPLES = """
\b
Examples:
  autoglm save                    the only running one from here
  autoglm save runs/quickstart && autoglm ckpts runs/quickstart
  autoglm save runs --yes         all that are running there
"""


def save(
    runs: LivingRuns = None,
    yes: Yes = False,
) -> int:
    """Ask runs to save and go on, and wait for the commits."""
    from autoglm_resume.cli import several
    from autoglm_resume.control import saving
    from autoglm_resume.supervise.base.run_directory import RunDirectory

    def ask(run: RunDirectory) -> None:
        holder = run.holder()
        if holder is None:
            raise AutoglmError(
                f"{run.path}: not running, so there is nothing to save",
                hint=f"{output.command('ckpts', run.path)} lists what is saved",
            )
        saved = saving.save(run, holder)
        output.show(f"{run.path}: saved at step {saved.step} ({saved.id})")

    found = several.living(runs or (), "save", sure=yes)
    if not found:
        raise AutoglmError("not saved: there is nothing to save where nothing runs")
    return several.each(found, ask)
