"""What a failure is recognised as, in real runs that fail for real."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Rehearsal
from tests.patience import PATIENCE

WAYS = {
    "import": ("launch", "No module named 'no_such_module'", "ModuleNotFoundError at train.py"),
    "loader": (
        "data_error",
        "data error: rank 1 failed with ValueError: Caught ValueError in DataLoader worker "
        "process 0. ValueError: sample 5 is broken at step 12",
        "in __getitem__",
    ),
    "full-disk": ("disk_full", "disk full: rank 1 failed with OSError: [Errno 28]", "train.py"),
    "leak": ("exception", "rank 1 failed with OSError: [Errno 24] Too many open", "train.py"),
    "slow-end": ("exception", "rank 1 failed with ValueError: the data is on fire", "train.py"),
}


def test_the_class_is_what_really_happened_and_the_result_is_the_same(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run("--at", "7", "--fail", ",".join(WAYS))
    assert finished.code == 0, finished
    failures = rehearsal.events("failure")
    for failure, (kind, words, place) in zip(failures, WAYS.values(), strict=True):
        assert words in finished.err
        assert (failure["kind"], failure["root_rank"]) == (kind, 1)
        assert place in failure["place"]
        assert "Traceback" in failure["tail"]
    assert rehearsal.final() == undisturbed


def test_a_connection_that_breaks_while_all_ranks_are_well_is_a_failure_of_communication(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run("--fail", "cut")
    assert finished.code == 0, finished
    assert rehearsal.events("failure")[0]["kind"] == "communication"
    assert "the ranks lost each other: rank" in finished.err
    assert rehearsal.final() == undisturbed


def test_a_rank_that_is_asked_to_end_from_outside_was_preempted(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(hold=("0:0:39",))
    rehearsal.wait_for("first_step")
    os.kill(rehearsal.events("attempt_started")[0]["pids"]["1"], signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "preempted: rank 1 was ended by SIGTERM from outside" in said
    assert rehearsal.events("failure")[0]["kind"] == "preempted"
    assert rehearsal.final() == undisturbed


@pytest.mark.slow
@pytest.mark.thorough
def test_below_torchrun_the_rank_that_torchrun_ended_is_no_suspect(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run("--fail", "loader", launcher="torchrun")
    assert finished.code == 0, finished
    failure = rehearsal.events("failure")[0]
    assert (failure["kind"], failure["root_rank"]) == ("data_error", 1)
    assert rehearsal.final() == undisturbed


def test_the_same_failure_again_without_progress_is_the_codes(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("--fail", "always").code == 1
    first, second, *_ = rehearsal.events("failure")
    assert first["kind"] == "exception"
    assert second["kind"] == "code_error"
    assert second["place"] == first["place"]
    assert "train.py" in first["place"]


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A real cgroup that allows 2 GiB."""
    group = Path(f"/sys/fs/cgroup/memory/autoglm-drill-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_one_that_was_killed(
    memory_limit: Path, rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start("--fail", "hog", heartbeat={"timeout": "1m"})
    (memory_limit / "cgroup.procs").write_text(str(process.pid))
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "out of host memory: rank 1 was killed by the kernel for lack of memory at step" in said
    failure = rehearsal.events("failure")[0]
    assert (failure["kind"], failure["root_rank"]) == ("host_oom", 1)
    assert "its cgroup's counter of OOM kills rose by 1" in failure["evidence"]
    assert rehearsal.final() == undisturbed
