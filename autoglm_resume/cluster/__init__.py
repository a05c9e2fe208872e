"""Schedulers: what a job is told by Slurm, and what Slurm is told by us.

`slurm` is pure, `commands` runs sbatch and squeue.
"""
