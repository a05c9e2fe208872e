"""What a dry run shows."""

from __future__ import annotations

import json as jsonlib
import shlex
import sys

from autoglm_resume.events import Judged
from autoglm_resume.job.paths import as_written
from autoglm_resume.observe.pure.say import rejection, short
from autoglm_resume.output import lines, printable
from autoglm_resume.supervise.start import Plan


def show(plan: Plan, *, json: bool) -> int:
    """Print `plan` on standard output; returns the exit code that starting it would begin with."""
    sys.stdout.write(as_json(plan) if json else as_text(plan))
    return plan.code


def as_json(plan: Plan) -> str:
    """One document."""
    document = {
        "job": plan.job,
        "command": plan.command,
        "environment": plan.environment,
        "verdicts": [verdict.to_json() for verdict in plan.verdicts],
        "resume": plan.resume,
        "step": plan.step,
        "changes": list(plan.changes),
        "outlook": plan.outlook,
    }
    return jsonlib.dumps(document, indent=2) + "\n"


def as_text(plan: Plan) -> str:
    """The job is valid YAML; what follows stands in comments, so the whole is a job file."""
    import yaml

    written = as_written(plan.job)
    job = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    if lines(job) != job:  # it would do something to a terminal: escaped, it is the same YAML
        job = yaml.safe_dump(written, sort_keys=False)
    comments = ["", "command of rank 0:", f"  {shlex.join(plan.command)}", "", "its environment:"]
    comments += [f"  {name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    if plan.changes:
        comments += ["", "what is another now than when the run was started last:"]
        comments += [f"  {change}" for change in plan.changes]
    comments += ["", *_gate(plan)]
    return job + "".join(f"# {printable(line)}".rstrip() + "\n" for line in comments)


def _gate(plan: Plan) -> list[str]:
    lines = ["checkpoints, newest first:"] if plan.verdicts else ["no checkpoint yet"]
    for verdict in plan.verdicts:
        refused = f"rejected: {rejection(Judged.from_json(verdict.to_json()))}"
        lines.append(f"  {verdict.id}  {short(verdict.reason) if verdict.accepted else refused}")
    return [*lines, *f"it would {plan.outlook}".splitlines()]
