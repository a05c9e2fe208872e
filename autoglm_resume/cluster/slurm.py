"""Slurm, as a job meets it: the script that is submitted, and the environment it then runs in.

Pure: texts in, texts out. https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from autoglm_resume.errors import UsageError
from autoglm_resume.job.paths import literal
from autoglm_resume.job.spec import Job

MARGIN = 20.0
"""Seconds for what follows the ranks' own end: the last checkpoint's way to the disk."""
EARLY = 60.0
"""Slurm may send a job's signal so many seconds before it was asked to."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_TASK = "\x7f"
"""Stands for the number of the array's task, which is known only where the job runs; a character
that no name has, and that JSON leaves alone."""


@dataclass(frozen=True)
class Allocation:
    """The Slurm job that a process is part of."""

    id: str
    """What Slurm's commands take: `12`, or `12_3` for task 3 of array 12. The plain number of a
    task may be that of its whole array."""
    restarts: int
    """How often Slurm has requeued it."""
    node: str
    ends: float | None
    """Unix seconds; where Slurm is older than 23.02 its commands have to be asked."""


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """The job that a process with this environment is part of, None outside Slurm."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    restarts, ends = environ.get("SLURM_RESTART_COUNT", ""), environ.get("SLURM_JOB_END_TIME", "")
    return Allocation(
        f"{array}_{task}" if array and task else job,
        int(restarts) if restarts.isdecimal() else 0,
        environ.get("SLURMD_NODENAME", ""),
        float(ends) if ends.isdecimal() else None,
    )


def lead(grace: float) -> float:
    """Seconds before a job's end at which its run has to be asked to stop."""
    return math.ceil(grace + MARGIN)


def time_limit(text: str) -> float | None:
    """Seconds in `sbatch --time` (`30`, `30:00`, `2:00:00`, `1-12`); None if it has no end.

    That is what 0 means there.
    """
    match = re.fullmatch(_TIME, text.strip())
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    # Minutes come first, but after days it is hours.
    first = 3600 if match["days"] or len(parts) == 3 else 60
    units = (first, first // 60, 1 if first == 3600 else 0)
    total = int(match["days"] or 0) * 86400.0 + sum(
        part * unit for part, unit in zip(parts, units, strict=False)
    )
    return total or None


def is_array(options: Sequence[str]) -> bool:
    """Whether `options` of sbatch ask for an array of jobs."""
    return any(re.match(r"--array\b|-a", option) for option in options)


def of_task(path: PurePath, task: str) -> PurePath:
    """Where a task of an array has what a single job has at `path`."""
    return path.with_name(f"{path.name}-{task}")


def script(
    job: Job,
    command: Sequence[str],
    *,
    time: str | None = None,
    partition: str | None = None,
    gpus: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """The batch script that runs `job` by `command`, and comes back when it was interrupted.

    It asks for what the job's `slurm` says, unless that is given here; `more` are options of
    sbatch. Raises UsageError for a time limit that leaves no time to train.
    """
    asked = job.slurm
    time = time or asked.time
    ahead = lead(job.preemption.grace)
    limit = time_limit(time) if time else None
    if limit is not None and limit <= ahead:
        raise UsageError(
            f"--time={time}: the run is to stop {ahead:.0f} s before the end (preemption.grace and "
            f"{MARGIN:.0f} s), which leaves no time to train",
            hint="ask for more time, or lower preemption.grace",
        )
    named = {
        "time": time,
        "partition": partition or asked.partition,
        "gpus": gpus or asked.gpus,
        "cpus-per-task": asked.cpus,
        "output": asked.output,
    }
    options = [
        f"--job-name={job.name}",
        f"--signal=B:USR2@{ahead:.0f}",
        *("--requeue", "--open-mode=append"),
        *(f"--{name}={value}" for name, value in named.items() if value is not None),
    ]
    lines = [f"#SBATCH {shlex.quote(option)}" for option in options]
    if further := (*asked.options, *more):
        lines.append(f"#SBATCH {shlex.join(further)}")
    return _SCRIPT.format(
        options="\n".join(lines),
        command=shlex.join(command),
        task="\n".join(f"        --set {_quoted(item)}" for item in _of_task(job)),
        replicas="".join(_MAKE.format(_quoted(each)) for each in _replicas(job) if each[0] == "/"),
    )


def _of_task(job: Job) -> list[str]:
    """Overrides by which every task of an array has a run of its own."""
    run, checkpoints = PurePath(job.run_dir), PurePath(job.checkpoint.dir)
    own = of_task(run, _TASK)
    inside = checkpoints.is_relative_to(run)
    where = own / checkpoints.relative_to(run) if inside else of_task(checkpoints, _TASK)
    values: dict[str, str | list[str]] = {
        "name": f"{job.name}-{_TASK}",
        "run_dir": literal(str(own)),
        "checkpoint.dir": literal(str(where)),
    }
    if job.checkpoint.replicas:
        values["checkpoint.replicas"] = [literal(each) for each in _replicas(job)]
    # JSON is YAML: what a name holds means nothing in it.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _replicas(job: Job) -> list[str]:
    """Where a task of an array has its replicas."""
    return [f"{replica.rstrip('/')}/{_TASK}" for replica in job.checkpoint.replicas]


def _quoted(text: str) -> str:
    """`text` for the shell, with the task's number where it belongs."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(
        shlex.quote(part) if part else "" for part in text.split(_TASK)
    )


# Only below a directory that is there: one that is not may be a mount that is missing, or hang.
_MAKE = "    timeout --signal=KILL 10 mkdir {} 2>/dev/null\n"

_SCRIPT = """\
#!/bin/bash
{options}

run=({command})
job=$SLURM_JOB_ID
if [[ -n ${{SLURM_ARRAY_TASK_ID:-}} ]]; then  # one run per task of an array
    job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
    run+=(
{task}
    )
{replicas}fi

# Slurm signals this shell alone. USR2 announces a preemption or the end of the time.
# With TERM Slurm has decided itself what becomes of the job, for instance by scancel.
trap 'told=${{told:-USR2}}; kill -USR2 "$supervisor" 2>/dev/null' USR2
trap 'told=TERM; kill -TERM "$supervisor" 2>/dev/null' TERM
"${{run[@]}}" &
supervisor=$!
[[ -z ${{told:-}} ]] || kill -s "$told" "$supervisor"
while kill -0 "$supervisor" 2>/dev/null; do
    wait "$supervisor"  # until it ends, or a signal comes
done
wait "$supervisor"
code=$?

case $code in
75) again=1 ;;  # interrupted, with a checkpoint
140) again=1 ;;  # interrupted by USR2 before the first checkpoint
76) ((${{SLURM_RESTART_COUNT:-0}})) && again=1 ;;  # this job's earlier life has not ended yet
esac
if [[ ${{again:-}} && ${{told:-}} != TERM ]]; then
    if ! command -v scontrol >/dev/null; then
        echo "autoglm: scontrol is not here; continue with: scontrol requeue $job" >&2
    elif ! scontrol requeue "$job"; then
        echo "autoglm: job $job was not requeued; continue with: scontrol requeue $job" >&2
    fi
fi
exit "$code"
"""
