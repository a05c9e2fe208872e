"""What a step boundary costs a rank: run by `overhead` as a real rank of a real supervisor."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import autoglm_resume as autoglm
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Board

BATCHES, CALLS = 100, 1000


def microseconds(call: Callable[[int], object]) -> float:
    """Of one call with a step number: the median of batches of calls."""
    times = []
    for batch in range(BATCHES):
        steps = range(batch * CALLS, (batch + 1) * CALLS)
        began = time.perf_counter_ns()
        for step in steps:
            call(step)
        times.append((time.perf_counter_ns() - began) / CALLS / 1000)
    return statistics.median(times)


model = torch.nn.Linear(8, 8)
session = autoglm.init()
session.track(
    model=model,
    optimizer=torch.optim.SGD(model.parameters()),
    sampler=autoglm.ResumableSampler(1_000_000_000, 1),
)
session.resume()
assignment = Assignment.from_environment()
assert assignment is not None
pulse = Board.open(Path(assignment.board)).pulse(session.rank)
found = {
    "empty loop": microseconds(lambda step: None),
    "heartbeat": microseconds(pulse.completed),
    "step boundary": microseconds(session.step_done),
    "step boundary with a loss": microseconds(lambda step: session.step_done(step, loss=1.0)),
}
Path(sys.argv[1]).write_text(json.dumps(found))
