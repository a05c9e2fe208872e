"""Slurm's own commands."""

from __future__ import annotations

import os
import shutil
import subprocess

from autoglm_resume.errors import UsageError


def submit(script: str) -> str:
    """Have sbatch take `script`; returns the job's id. Raises UsageError with what sbatch said."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UsageError(
            "sbatch: not found here",
            hint="run this where Slurm's commands are; --dry-run prints the script",
        ) from None
    if done.returncode:
        said = done.stderr.strip() or f"it ended with exit code {done.returncode}"
        raise UsageError(f"sbatch did not take the job: {said}")
    return done.stdout.strip().partition(";")[0]


def ask_end(job: str) -> subprocess.Popen[str] | None:
    """`squeue`, begun: it prints when `job` ends, in Unix seconds; None if it is not here.

    Slurm's daemon may be slow to answer, or away: nobody should wait for the end of this.
    """
    if shutil.which("squeue") is None:
        return None
    return subprocess.Popen(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%e"],
        env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
