"""`autoglm slurm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoglm_resume import output

EXAMPLES = """
\b
Examples:
  autoglm slurm submit job.yaml --time 4:00:00 --partition gpu --gpus 4
  autoglm slurm submit job.yaml --set checkpoint.keep=5 --dry-run
  autoglm slurm submit job.yaml -- --array=0-7 --mem=64G     what sbatch takes, after --
"""


def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", show_default=False, help="Options of sbatch."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field; repeatable."),
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="Time limit, as for sbatch.")
    ] = None,
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="NAME", help="Where to run.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="N", help="GPUs, as for sbatch.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script, submit nothing.")
    ] = False,
) -> int:
    """Submit the job: it saves before Slurm ends it, and comes back.

    What is not given here is as the job file's section slurm has it.
    """
    import sys

    from autoglm_resume.cluster import commands, slurm
    from autoglm_resume.job.load import load

    job = load(job_file, overrides or ())
    command = [sys.executable, "-m", "autoglm_resume.cli", "run", str(job_file.resolve())]
    for override in overrides or ():
        command += ["--set", override]
    script = slurm.script(job, command, time=time, partition=partition, gpus=gpus, more=more or ())
    if dry_run:
        output.verbatim(script)
        return 0
    if job.slurm.output is not None and "%" not in str(job.slurm.output.parent):
        # Slurm ends a job whose output it cannot open, and says so nowhere.
        job.slurm.output.parent.mkdir(parents=True, exist_ok=True)
    output.show(commands.submit(script))
    if slurm.is_array((*job.slurm.options, *(more or ()))):
        where = f"the runs will be in {slurm.of_task(job.run_dir, 'TASK')}"
    else:
        where = f"the run will be in {job.run_dir}"
    output.say(where)
    return 0
