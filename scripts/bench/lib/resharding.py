"""Whether a run goes on exactly with another number of ranks: the elastic mode of `exactness`.

train_small.py begins with 4 ranks and is asked to stop; 2 go on, until their supervisor is killed;
3 finish it. Every rank holds, once it has resumed, the very weights and moments that the checkpoint
has; every epoch has every sample once, though the global batch changes with the number of ranks;
and the loss goes on from where it was.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections import Counter
from typing import Any

from lib import common
from lib.small_run import Run
from scripts.train_small import SAMPLES

RANKS = (4, 2, 3)
STEPS = 160
STAGE = 14
"""Steps after which the next number of ranks takes over, as soon as they are checkpointed."""
PAUSE = 0.01
"""Seconds after each step, so that the run is not over before it is stopped."""
AROUND = 5
"""Steps whose mean loss is compared, before and after a switch."""
TOLERANCE = 0.3
"""By which the loss may rise, as it does by chance; a run that lost its weights rises by 1."""


def measure() -> common.Report:
    """The run, and what its resharding changed."""
    # Training waits for its saves: with a busy disk it would be over before it is stopped.
    checkpoint = {"every": {"steps": 4}, "on_busy": "wait", "keep": 1000}
    run = Run("elastic", STEPS, checkpoint, f"--pause={PAUSE}")
    attempt = -1
    try:
        for ranks in RANKS:
            common.say(f"{ranks} ranks")
            run.start(ranks, guards={"world_size": "elastic"})
            if ranks != RANKS[-1]:
                started = run.next_attempt(attempt)
                attempt = started["attempt"]
                go_on_until(run, started["step"] + STAGE)
                how = signal.SIGTERM if ranks == RANKS[0] else signal.SIGKILL
                run.stop(how, 75 if how is signal.SIGTERM else -how)
        run.finish()
    finally:
        run.end()
    return conclude(run)


def go_on_until(run: Run, step: int) -> None:
    """Wait until a checkpoint of `step` or later is committed. Raises Stuck."""

    def committed() -> bool:
        run.journal.new()
        return any(e["event"] == "committed" and e["step"] >= step for e in run.journal.all)

    common.wait_for(committed, f"checkpoint of step {step}", run.process, run.output)


def conclude(run: Run) -> common.Report:
    """Tables and checks."""
    switches = [event for event in run.journal.all if event["event"] == "resharded"]
    starts = {event["step"]: event["attempt"] for event in run.attempts()}
    kept, losses = run.kept(), mean_losses(run.kept())
    rows, unlike, rises = [], 0, []
    for event in switches:
        step = event["step"]
        expected = run.loaded(event["id"])[0]
        resumed = run.resumed(starts[step], event["to"])
        unlike += sum(found != expected for found in resumed.values())
        before, after = around(losses, step)
        rises.append(after - before)
        rows.append((step, event["from"], event["to"], event["global_batch"], before, after))
    common.table(
        "switches", ("step", "from", "to", "global batch", "loss before", "loss after"), rows
    )
    epochs, wrong = epochs_of(kept)
    missing = [step for step in range(STEPS) if step not in losses]
    report = common.Report("exactness")
    report.rounds = switches
    report.results = {"mode": "elastic", "steps": STEPS, "epochs": epochs, "losses": losses}
    check = common.Check
    report.checks = [
        check.at_least("switches of the number of ranks", len(rows), len(RANKS) - 1, "switches"),
        check.at_most("ranks that resumed with other weights or moments", unlike, 0, "ranks"),
        check.at_least("whole epochs", epochs, 2, "epochs"),
        check.at_most("samples not seen exactly once in an epoch", wrong, 0, "samples"),
        check.at_most("steps missing or without a finite loss", len(missing), 0, "steps"),
        check.at_most("largest rise of the loss", max(rises, default=math.inf), TOLERANCE, "nats"),
    ]
    return report


def mean_losses(kept: list[dict[str, Any]]) -> dict[int, float]:
    """Of each step over its ranks, where they are finite."""
    found: dict[int, list[float]] = {}
    for line in kept:
        found.setdefault(line["step"], []).append(line["loss"])
    means = {step: statistics.mean(values) for step, values in sorted(found.items())}
    return {step: mean for step, mean in means.items() if math.isfinite(mean)}


def around(losses: dict[int, float], step: int) -> tuple[float, float]:
    """Mean loss of the last steps before `step`, and of the first from there."""
    before = [losses[n] for n in range(step - AROUND, step) if n in losses]
    after = [losses[n] for n in range(step, step + AROUND) if n in losses]
    return statistics.mean(before), statistics.mean(after)


def epochs_of(kept: list[dict[str, Any]]) -> tuple[int, int]:
    """Whole epochs that were dealt, and samples that were not seen exactly once in theirs."""
    lines = sorted(kept, key=lambda line: line["step"])
    dealt = [sample for line in lines for sample in line["samples"]]
    epochs, wrong = len(dealt) // SAMPLES, 0
    for epoch in range(epochs):
        seen = Counter(dealt[epoch * SAMPLES : (epoch + 1) * SAMPLES])
        wrong += sum(seen[sample] != 1 for sample in range(SAMPLES))
    return epochs, wrong
