"""The zoo (scripts/zoo): each program undisturbed, and once more with kills of its ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import common

EVERY = 4
"""Steps between two saves."""
KILLS = 3
REFUSED = 90
PATIENCE = 300


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    name: str
    kills: tuple[int, ...]
    """Steps that the rank had completed when it was killed."""
    answer: str
    """`exact`, `refused`, or what was wrong."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether nobody was left with another result."""
        return self.answer in ("exact", "refused")


def measure(seed: int, names: list[str]) -> common.Report:
    """Every program, or those in `names`."""
    import sys

    sys.path.insert(0, str(common.SCRIPTS))
    from zoo import data, loops, optimizers, parallel  # noqa: F401
    from zoo.registry import ZOO

    report = common.Report("exactness")
    order = random.Random(seed)
    outcomes, absent = [], {}
    for name, kind in ZOO.items():
        if names and name not in names:
            continue
        missing = [each for each in kind.needs if importlib.util.find_spec(each) is None]
        if missing:
            absent[name] = f"no {', '.join(missing)} here"
            continue
        outcome = _one(name, kind.ranks, kind.refused, order)
        outcomes.append(outcome)
        common.say(f"{name}: {outcome.answer} {outcome.detail}")
    common.table(
        "programs",
        ("program", "killed after steps", "the end", ""),
        [(o.name, " ".join(map(str, o.kills)), o.answer, o.detail) for o in outcomes],
    )
    for name, why in absent.items():
        print(f"  {name} was left out: {why}")
    report.rounds = [vars(outcome) for outcome in outcomes]
    report.results = {"programs": len(outcomes), "left_out": absent, "seed": seed}
    report.checks = [
        common.Check.at_least("programs", len(outcomes), len(names) or 24, "programs"),
        common.Check.at_least(
            "kills delivered to programs that ended",
            min((len(o.kills) for o in outcomes if o.answer != "refused"), default=0),
            KILLS,
            "kills",
        ),
        common.Check.at_most(
            "programs that ended otherwise", sum(not o.ok for o in outcomes), 0, "programs"
        ),
    ]
    return report


def _one(name: str, ranks: int, refused: str, order: random.Random) -> Outcome:
    calm = _Run(name, "undisturbed", ranks)
    code, said = calm.finish()
    if code and refused and refused in said and not calm.trained():
        return Outcome(name, (), "refused", _reason(said))
    if code:
        return Outcome(name, (), "failed undisturbed", calm.tail())
    disturbed = _Run(name, "disturbed", ranks)
    kills = tuple(disturbed.kill(order))
    code, said = disturbed.finish()
    if code == REFUSED:
        told = bool(refused) and refused in said
        return Outcome(name, kills, "refused" if told else "refused, unexpectedly", _reason(said))
    if code:
        return Outcome(name, kills, f"exit code {code}", disturbed.tail())
    ours, theirs = calm.digests(), disturbed.digests()
    unlike = [
        f"{file}: {key}"
        for file in ours
        for key in ours[file]
        if ours[file][key] != theirs.get(file, {}).get(key)
    ]
    return Outcome(name, kills, "another result" if unlike else "exact", ", ".join(unlike))


class _Run:
    def __init__(self, name: str, how: str, ranks: int) -> None:
        self.directory = common.fresh_directory(f"ordinary/{name}-{how}")
        self.journal = common.Lines(self.directory / "run" / "events.jsonl")
        self.output = self.directory / "output"
        self.ranks = ranks
        job = common.write_job(
            self.directory,
            script=str(common.SCRIPTS / "zoo" / "train.py"),
            args=[name, str(self.directory)],
            nproc_per_node=ranks,
            checkpoint={"every": {"steps": EVERY}, "on_busy": "wait"},
            restart={"max_restarts": 50, "without_progress": 6, "backoff": 0, "max_backoff": 0},
        )
        self.process = common.spawn([*common.autoglm(), "run", str(job)], self.output)

    def kill(self, order: random.Random) -> list[int]:
        """Kill a rank `KILLS` times, each in another attempt and beyond where that began."""
        killed: list[int] = []
        attempt = -1
        while len(killed) < KILLS and self.process.poll() is None:
            began = self._next_attempt(attempt)
            if began is None:
                break
            attempt = began["attempt"]
            step = self._strike(began, order)
            if step is not None:
                killed.append(step)
        return killed

    def _next_attempt(self, after: int) -> dict[str, Any] | None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.journal.new()
            for event in self.journal.all:
                if event["event"] == "attempt_started" and event["attempt"] > after:
                    return event
            if self.process.poll() is not None:
                return None
            time.sleep(0.01)
        raise common.Stuck(f"{self.output}: attempt {after + 1} did not come")

    def _strike(self, began: dict[str, Any], order: random.Random) -> int | None:
        from autoglm_resume.protocol.heartbeats import Board
        from autoglm_resume.supervise.base.run_directory import RunDirectory

        rank = order.randrange(self.ranks)
        holder = RunDirectory(self.directory / "run").holder()
        if holder is None:
            return None
        try:
            board, victim = Board.open(Path(holder.board)), os.pidfd_open(began["pids"][str(rank)])
        except OSError:
            return None
        ahead = order.randint(0, EVERY)
        try:
            # Beyond a checkpoint of its own, so that each attempt goes on where the last one came.
            while board.beat(rank).step < max(self._saved() + ahead, began["step"] + 1 + ahead):
                if self.process.poll() is not None:
                    return None
                try:
                    signal.pidfd_send_signal(victim, 0)
                except ProcessLookupError:
                    return None
                time.sleep(0.0005)
            time.sleep(order.uniform(0, 0.02))
            step = board.beat(rank).step
            signal.pidfd_send_signal(victim, signal.SIGKILL)
            return int(step)
        except ProcessLookupError:
            return None
        finally:
            os.close(victim)
            board.close()

    def _saved(self) -> int:
        """The newest committed step."""
        self.journal.new()
        steps = [each["step"] for each in self.journal.all if each["event"] == "committed"]
        return max(steps, default=EVERY)

    def finish(self) -> tuple[int, str]:
        """Its exit code, and all it said."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            common.end(self.process)
            code = -1
        return code, self.output.read_text(errors="replace")

    def trained(self) -> bool:
        """Whether more than one step was: some state shows what it is only after the first."""
        seen = self.directory.glob("seen-*.jsonl")
        return any({json.loads(line)[0] for line in path.open()} - {0} for path in seen)

    def tail(self) -> str:
        """The last line that it said."""
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return lines[-1][:160] if lines else ""

    def digests(self) -> dict[str, dict[str, str]]:
        """Of everything each rank had at its end."""
        return {
            path.name: json.loads(path.read_text()) for path in self.directory.glob("final-*.json")
        }


def _reason(said: str) -> str:
    """The line that says why it was refused."""
    words = ("expected", "only in", "cannot be")
    lines = [line for line in said.splitlines() if any(word in line for word in words)]
    return lines[-1].strip()[:160] if lines else ""
