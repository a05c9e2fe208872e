"""The timeline of a run: what died, what was done about it, and what is left of the time."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from autoglm_resume import journal, output
from autoglm_resume.observe.live import Screen
from autoglm_resume.observe.pure.explain import reason
from autoglm_resume.observe.pure.goodput import Summary, summarize
from autoglm_resume.observe.pure.recovery import Recovery
from autoglm_resume.observe.pure.say import brief, plural, seconds
from autoglm_resume.observe.tables import Table
from autoglm_resume.output import printable


@contextlib.contextmanager
def afterwards(run_dir: Path, screen: Screen, *, json: bool) -> Iterator[None]:
    """Print the timeline of the run in `run_dir` on standard output when the block is done."""
    with contextlib.ExitStack() as after:
        after.callback(screen.last)
        try:
            yield
        finally:
            screen.close()
            # Nobody may be there to read what follows; a scheduler waits for the exit code.
            output.hurry()
        summary = summarize(journal.read(Path(run_dir) / "events.jsonl"))
        show(summary, sys.stdout, json=json)
        output.flush()
    if summary.state == "interrupted":
        output.say(f"continue with: {output.command('resume', output.near(Path(run_dir)))}")


def show(summary: Summary, stream: TextIO, *, json: bool = False) -> None:
    """On `stream`: one JSON document, or tables."""
    if json:
        stream.write(jsonlib.dumps(to_json(summary), indent=2) + "\n")
        return
    count = len(summary.attempts)
    ranks = f", {plural(summary.world_size, 'rank')}" if summary.world_size else ""
    name = printable(summary.name or "the run")
    stream.write(f"\nTimeline of {name}{ranks}, {plural(count, 'attempt')}\n\n")
    if summary.recoveries:
        _table(summary).print(stream)
        stream.write("\n")
        for index, recovery in enumerate(summary.recoveries, 1):
            for line in details(recovery):
                stream.write(f"{index:>3}  {printable(line)}\n")
        stream.write("\n")
    facts(summary).print(stream)


def to_json(summary: Summary) -> dict[str, Any]:
    """Every figure; durations in seconds."""
    return {
        **asdict(summary),
        "goodput": summary.goodput,
        "recoveries": [
            {**asdict(recovery), "phases": dict(recovery.phases)} for recovery in summary.recoveries
        ],
    }


def _table(summary: Summary) -> Table:
    headers = ("#", "what died", "detected after", "went on from", "to next step", "steps lost")
    table = Table(headers, right=frozenset((0, 2, 4, 5)))
    for index, recovery in enumerate(summary.recoveries, 1):
        mark = "drill: " if recovery.drills else ""
        table.add(
            index,
            mark + brief(recovery.what),
            "" if recovery.detected is None else seconds(recovery.detected),
            _went_on(recovery),
            "" if recovery.total is None else seconds(recovery.total),
            recovery.lost,
            style="red" if recovery.gave_up else "",
        )
    return table


def _went_on(recovery: Recovery) -> str:
    if recovery.gave_up:
        return "gave up"
    return "" if recovery.from_step is None else f"step {recovery.from_step}"


def details(recovery: Recovery) -> list[str]:
    """Lines below the table: why this checkpoint, and where the time went."""
    found = []
    if recovery.drills:
        found.append(f"ordered by --drill {', '.join(recovery.drills)}")
    found += [f"step {no.step} rejected: {brief(no.reason)}" for no in recovery.rejected]
    if recovery.checkpoint is not None and recovery.checks:
        newest = "the newest acceptable" if recovery.rejected else "the newest"
        found.append(
            f"step {recovery.from_step} taken: {newest}, accepted on {', '.join(recovery.checks)}"
        )
    if recovery.from_step == 0 and recovery.checkpoint is None and recovery.next_attempt:
        found.append("step 0: there was no checkpoint yet")
    if recovery.phases:
        shown = [f"{name} {seconds(took)}" for name, took in recovery.phases if took >= 5e-4]
        found.append(" + ".join(shown))
    if recovery.gave_up:
        found.append(f"gave up: {brief(recovery.gave_up)}")
    return found


def facts(summary: Summary, step: int | None = None) -> Table:
    """The run as a whole; `step` is what is known better than from the journal."""
    step = summary.step if step is None else step
    table = Table()
    why = brief(reason(summary))
    table.add("state", f"{summary.state}: {why}" if why else summary.state)
    lost = sum(r.lost or 0 for r in summary.recoveries)
    if step is not None:
        table.add("steps", f"{step} complete" + (f", {lost} run again" if lost else ""))
    if summary.checkpoint_step is not None:
        table.add("last checkpoint", f"step {summary.checkpoint_step} ({summary.checkpoint})")
    if summary.interval:
        table.add("saves", summary.interval)
    if summary.saves_skipped:
        table.add("skipped saves", f"{summary.saves_skipped}, while the last was being written")
    if summary.save_failures:
        table.add("failed saves", summary.save_failures)
    down = f", {seconds(summary.down)} of it without a supervisor" if summary.down >= 0.5 else ""
    table.add("elapsed", seconds(summary.elapsed) + down)
    if summary.kept is not None:
        table.add(
            "kept steps", f"{seconds(summary.kept)}, and {seconds(summary.saving)} in their saves"
        )
    if summary.goodput is not None:
        table.add("goodput", f"{summary.goodput:.1%}")
    done = summary.state == "finished" and summary.checkpoint_step == summary.step
    what = "final" if done else "saved"
    for name, digest in summary.objects.items():
        table.add(f"{what} {name}", digest)
    return table
