"""One run of train_20m.py under one system, hurt once, until every rank has completed a step."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from lib import common, peers

EVERY = 5
BEYOND = 2
"""Steps completed after a checkpoint at the injection."""
STEPS = 100_000
"""Nobody waits for the end."""
VICTIM = 1
PATIENCE = {"kill": 90.0, "hang": 150.0}
SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}

MARKS = ("first line", "import torch", "model", "process group", "load", "step")
"""What the script marks, in its order; "step" is the first one."""
OWN = ("detect", "stop", "gate", "fork")
"""What the supervisor does meanwhile, in its order."""


class Hurt:
    """The run."""

    def __init__(self, name: str, system: peers.System, scenario: str) -> None:
        self.name, self.system, self.scenario = name, system, scenario
        directory = common.fresh_directory(f"recovery/{scenario}-{name.replace(', ', '-')}")
        self.place = peers.Place(directory, system.python, STEPS, EVERY)
        self._lines = common.Lines(self.place.marks)
        self._journal = common.Lines(directory / "run" / "events.jsonl")
        self._pids: dict[int, int] = {}
        """Of the ranks at the injection."""
        self._old: set[int] = set()
        """Of all ranks up to then: one that seemed to hang was restarted before."""

    def recover(self) -> dict[str, Any]:
        """Seconds after the injection at which all ranks reached each mark. Raises Stuck."""
        process = self.system.start(self.place)
        try:
            self._wait(self._ready, "the moment to strike", process)
            self._old = {line["pid"] for line in self._lines.all}
            struck = time.monotonic()
            os.kill(self._pids[VICTIM], SIGNALS[self.scenario])
            self._wait(self._stepped, "a step of all new ranks", process)
        finally:
            pids = {line["pid"] for line in self._lines.all}
            peers.end(process, [*pids])
        found: dict[str, float] = {}
        for line in self._new():
            if line["what"] in MARKS and (line["what"] != "step" or line["step"] == self._first()):
                found[line["what"]] = max(line["mono"] - struck, found.get(line["what"], 0.0))
        result = {"seconds": found["step"], "marks": found, "resumed_at": self._first()}
        if self.system.ours:
            self._journal.new()
            result["supervisor"] = own = share(self._journal.all, struck)
            for mark, moment in found.items():  # a spare did some of it before
                found[mark] = max(moment, own["fork"])
        return result

    def _wait(
        self, condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]
    ) -> None:
        text = f"{what} under {self.name}"
        patience = PATIENCE[self.scenario]
        common.wait_for(condition, text, process, self.place.output, patience, pause=0.005)

    def _ready(self) -> bool:
        """Whether all ranks are some steps beyond a checkpoint, and spares are ready."""
        self._lines.new()
        steps: dict[int, int] = {}
        for line in self._lines.all:
            self._pids[line["rank"]] = line["pid"]
            if line["what"] == "step":
                steps[line["rank"]] = line["step"]
        saved = self._saved()
        if len(steps) < peers.RANKS or not saved or min(steps.values()) < saved + BEYOND:
            return False
        ready = sum(event["event"] == "spare_ready" for event in self._journal.all)
        return ready >= peers.RANKS or self.system.start != peers.start_autoglm_with_spares

    def _saved(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        self._journal.new()
        ours = [e["step"] for e in self._journal.all if e["event"] == "committed"]
        theirs = [line["step"] for line in self._lines.all if line["what"] == "saved"]
        return int(max([0, *ours, *theirs]))

    def _new(self) -> list[dict[str, Any]]:
        """What ranks wrote that are not those of before."""
        self._lines.new()
        return [line for line in self._lines.all if line["pid"] not in self._old]

    def _first(self) -> int:
        return min(int(line["step"]) for line in self._new() if line["what"] == "step")

    def _stepped(self) -> bool:
        stepped = {line["rank"] for line in self._new() if line["what"] == "step"}
        if len(stepped) < peers.RANKS:
            return False
        if self._first() == 1:
            raise common.Stuck(f"{self.name} began anew instead of at its checkpoint")
        return True


def share(events: list[dict[str, Any]], struck: float) -> dict[str, float]:
    """Seconds after the injection of what the supervisor did, up to the last new rank's line."""
    second = next(
        n for n, e in enumerate(events) if e["event"] == "attempt_started" and e["attempt"] == 1
    )
    failure = next(e for e in events if e["event"] == "failure")
    stopped = next(e for e in events if e["event"] == "group_stopped")
    gate = next(e for e in reversed(events[:second]) if e["event"] == "gate")
    ranks = [e for e in events if e["event"] == "rank_started" and e["attempt"] == 1]
    return {
        "detect": failure["mono"] - struck,
        "stop": stopped["mono"] - struck,
        "gate": gate["mono"] - struck,
        "fork": max(e["mono"] for e in ranks) - struck,
    }


def steps_between(moments: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """How long each of `names` took, from the moments at which it was over."""
    took, before = {}, 0.0
    for name in names:
        took[name] = moments[name] - before
        before = moments[name]
    return took
