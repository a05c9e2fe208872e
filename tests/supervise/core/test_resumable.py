from __future__ import annotations

from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.supervise.core import resumable

STARTED = {"event": "supervisor_started"}
SLURM = {"event": "slurm", "job": "12_3"}
LEFT = "left to Slurm; continue it with: scontrol requeue"
BRANCHED = {"event": "branched", "step": 10}
COMPLETED = {"event": "run_completed", "step": 40}
KEPT = {"event": "job_kept"}
INTERRUPTED = {"event": "run_interrupted", "code": 75, "reason": "stopped"}


def failed(code: int) -> dict[str, Any]:
    return {"event": "run_failed", "code": code, "reason": "the data is on fire"}


@pytest.mark.parametrize(
    ("told", "goes_on", "why"),
    [
        ([], True, "it never began"),
        ([STARTED], True, "its supervisor died"),
        ([STARTED, INTERRUPTED], True, "interrupted: stopped"),
        ([STARTED, INTERRUPTED, STARTED], True, "its supervisor died"),
        ([STARTED, failed(1)], False, "left alone, exit code 1: the data is on fire"),
        ([STARTED, failed(93)], False, "left alone, exit code 93: the data is on fire"),
        ([STARTED, failed(90), STARTED], True, "its supervisor died"),
        ([STARTED, COMPLETED], False, "finished at step 40"),
        ([STARTED, {**COMPLETED, "step": -1}], False, "finished"),
        ([STARTED, COMPLETED, STARTED, BRANCHED], True, "its supervisor died"),
        ([STARTED, SLURM], False, f"{LEFT} 12_3"),
        ([STARTED, SLURM, COMPLETED], False, "finished at step 40"),
        ([STARTED, SLURM, INTERRUPTED, STARTED], True, "its supervisor died"),
        ([STARTED, INTERRUPTED, STARTED, failed(90), KEPT], True, "interrupted: stopped"),
        ([STARTED, STARTED, failed(2), KEPT], True, "its supervisor died"),
        ([STARTED, SLURM, STARTED, failed(2), KEPT], False, f"{LEFT} 12_3"),
        (
            [STARTED, failed(1), STARTED, failed(90), KEPT],
            False,
            "left alone, exit code 1: the data is on fire",
        ),
        ([STARTED, failed(90), KEPT, STARTED], True, "its supervisor died"),
        (
            [STARTED, {"event": "run_failed"}],
            False,
            "left alone, exit code ?: no reason was recorded",
        ),
    ],
)
def test_what_goes_on_by_itself(told: list[dict[str, Any]], goes_on: bool, why: str) -> None:
    assert resumable.of(list(map(events.read, told))) == resumable.Standing(goes_on, why)


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 0),
        ([0, 76], 0),
        ([0, 75, 76], 75),
        ([75, 143, 137], 143),
        ([143, 2, 0], 2),
        ([93, 90, 75], 90),
        ([93, 1, 90], 1),
    ],
)
def test_the_code_that_needs_a_person_most_is_that_of_all(codes: list[int], worst: int) -> None:
    assert resumable.worst(codes) == worst
