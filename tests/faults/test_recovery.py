"""Every way a rank can die: the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from typing import Any

import pytest

from tests.faults.conftest import Rehearsal, all_dead, finish
from tests.patience import PATIENCE


def test_drills_one_after_the_other_change_nothing_in_the_result(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    drills = {
        "kill:rank=0,step=7": "rank 0 died by SIGKILL",
        "kill:rank=1,step=12": "rank 1 died by SIGKILL",
        "stop:rank=1,step=17": "rank 1 stopped making progress",
        "exit:code=3,rank=1,step=22": "rank 1 exited with code 3 at step 2",
    }
    process = rehearsal.start(drill=tuple(drills), hold=("3:1:22",))
    rehearsal.wait_for("drill", lambda event: event["attempt"] == 3)
    rehearsal.release(22)
    finished = finish(process)
    assert finished.code == 0, finished
    assert not [words for words in drills.values() if words not in finished.err], finished
    assert finished.err.count("autoglm: drill:") == len(drills)
    assert len(rehearsal.events("attempt_started")) == len(drills) + 1
    assert [event["spec"] for event in rehearsal.events("drill")] == list(drills)
    assert rehearsal.final() == undisturbed


def test_a_drill_that_corrupts_the_newest_checkpoint_changes_nothing_in_the_result(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run(drill=("corrupt:latest,step=12",))
    assert finished.code == 0, finished
    assert "rejected: integrity" in finished.err
    assert len(rehearsal.events("attempt_started")) == 2
    assert rehearsal.final() == undisturbed


def test_a_rank_that_fails_by_itself_is_named_and_the_result_is_the_same(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    ways = {
        "steal-port": ("port_in_use", "rank 0 failed with"),
        "raise": ("exception", "rank 1 failed with ValueError: the data is on fire"),
        "segv": ("crashed", "rank 1 died by SIGSEGV"),
        "abort": ("crashed", "rank 1 died by SIGABRT"),
        "exit": ("exited", "rank 1 exited with code 17"),
    }
    finished = rehearsal.run("--at", "7", "--fail", ",".join(ways))
    assert finished.code == 0, finished
    assert not [words for _, words in ways.values() if words not in finished.err], finished
    kinds = [event["kind"] for event in rehearsal.events("failure")]
    assert kinds == [kind for kind, _ in ways.values()]
    assert rehearsal.final() == undisturbed


def test_the_first_failing_ranks_traceback_comes_first_and_has_none_of_our_frames(
    rehearsal: Rehearsal,
) -> None:
    finished = rehearsal.run("--fail", "raise")
    failure = rehearsal.events("failure")[0]
    assert failure["root_rank"] == 1
    assert 'raise ValueError("the data is on fire")' in failure["traceback"]
    assert "autoglm_resume" not in failure["traceback"]
    assert "rank 1 failed first" in finished.err


def test_all_ranks_killed_at_once_come_back(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(hold=("0:0:12", "1:0:22"))
    for attempt, both in enumerate((("0", "1"), ("1", "0"))):
        rehearsal.wait_for("committed", lambda event, step=10 + 10 * attempt: event["step"] == step)
        pids = rehearsal.events("attempt_started")[attempt]["pids"]
        for rank in both:
            with contextlib.suppress(ProcessLookupError):  # the supervisor may be as quick
                os.kill(pids[rank], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0
    assert rehearsal.final() == undisturbed


def test_the_torchrun_launcher_recovers_to_the_same_result(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run(drill=("kill:rank=1,step=12",), launcher="torchrun")
    assert finished.code == 0, finished
    assert "rank 1 died by SIGKILL" in finished.err
    assert rehearsal.final() == undisturbed


def test_a_fixed_port_is_free_again_for_every_restart(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    drills = ("kill:rank=1,step=12", "kill:rank=0,step=22")
    finished = rehearsal.run(drill=drills, env={"MASTER_PORT": port})
    assert finished.code == 0, finished
    assert [e["port"] for e in rehearsal.events("attempt_started")] == [port] * 3
    assert rehearsal.final() == undisturbed


def test_every_attempt_meets_at_a_store_that_was_opened_ahead(rehearsal: Rehearsal) -> None:
    assert rehearsal.run(drill=("kill:rank=1,step=12",)).code == 0
    for attempt in ("000", "001"):
        assignment = rehearsal.run_dir / "attempts" / attempt / "assignment.json"
        assert json.loads(assignment.read_text())["agent_store"] is True


def test_a_dead_zygote_hurts_nobody_and_the_next_restart_still_works(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    process = rehearsal.start(hold=("0:0:39",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 5)
    ranks = set(rehearsal.events("attempt_started")[0]["pids"].values())
    os.kill(rehearsal.events("zygote_ready")[0]["pid"], signal.SIGKILL)
    assert "SIGKILL" in rehearsal.wait_for("zygote_lost")["reason"]
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    assert len(rehearsal.events("attempt_started")) == 1
    os.kill(max(ranks), signal.SIGKILL)
    assert process.wait(PATIENCE) == 0
    assert len(rehearsal.events("attempt_started")) == 2
    assert rehearsal.final() == undisturbed


def test_a_module_that_starts_a_thread_when_imported_is_left_to_the_ranks(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    (rehearsal.directory / "threads.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(rehearsal.directory), *_path()]))
    finished = rehearsal.run(preload=["threads"])
    assert finished.code == 0, finished
    assert "threads" in rehearsal.events("zygote_lost")[0]["reason"]
    assert rehearsal.final() == undisturbed


@pytest.mark.slow
@pytest.mark.thorough
def test_where_a_zygote_cannot_fork_ranks_start_cold(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    (rehearsal.directory / "sitecustomize.py").write_text(
        "import sys, threading, time\n"
        "if 'autoglm_resume.worker.zygote' in sys.orig_argv:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(rehearsal.directory), *_path()]))
    finished = rehearsal.run(drill=("kill:rank=1,step=12",))
    assert finished.code == 0, finished
    assert "2 threads" in rehearsal.events("zygote_lost")[0]["reason"]
    assert len(rehearsal.events("cold_start")) == 2
    assert rehearsal.final() == undisturbed


def test_one_rank_is_forked_although_numpy_starts_threads(rehearsal: Rehearsal) -> None:
    finished = rehearsal.run("--steps", "10", nproc_per_node=1)
    assert finished.code == 0, finished
    assert not rehearsal.events("cold_start")
    assert not rehearsal.events("zygote_lost")


def test_nothing_that_a_rank_started_outlives_an_attempt_that_failed(rehearsal: Rehearsal) -> None:
    process = rehearsal.start("--fail", "daemon", hold=("0:0:39",))
    rehearsal.wait_for("committed", lambda e: e["step"] >= 10)
    started = _named(rehearsal, "sleep")
    assert started
    os.kill(rehearsal.events("attempt_started")[0]["pids"]["1"], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0
    assert all_dead(started)
    # Those of the attempt that came to its good end were left on purpose.
    assert rehearsal.workers() == _named(rehearsal, "sleep")
    rehearsal.kill_workers()


def test_a_rank_that_hangs_after_its_script_has_ended_does_not_hold_up_the_run(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    finished = rehearsal.run("--fail", "never-end", heartbeat={"timeout": "1s"})
    assert finished.code == 0, finished
    assert "rank 1 did not end" in finished.err
    assert len(rehearsal.events("attempt_started")) == 1
    assert rehearsal.final() == undisturbed


def test_a_run_without_inotify_recovers_to_the_same_result(
    rehearsal: Rehearsal, undisturbed: dict[str, str], none_left: tuple[str, ...]
) -> None:
    rehearsal.around = none_left
    finished = rehearsal.run(drill=("kill:rank=1,step=12",))
    assert finished.code == 0, finished
    assert "rank 1 died by SIGKILL" in finished.err
    assert {event["rank"] for event in rehearsal.events("restored")} == {0, 1}
    assert rehearsal.final() == undisturbed


def test_saves_by_the_clock_happen_at_one_step_on_all_ranks(
    rehearsal: Rehearsal, undisturbed: dict[str, str]
) -> None:
    clock = {"every": {"seconds": "100ms"}}
    finished = rehearsal.run("--pause", "0.02", checkpoint=clock)
    assert finished.code == 0, finished
    assert rehearsal.events("committed")[-1]["step"] == 40
    assert rehearsal.final() == undisturbed
    # How many fit into so many steps is up to the machine.
    rehearsal.run_dir.rename(rehearsal.directory / "forty")
    process = rehearsal.start("--steps", "100000", checkpoint=clock)
    steps: set[int] = set()
    rehearsal.wait_for("committed", lambda e: steps.add(e["step"]) or len(steps) == 3)
    process.terminate()
    assert process.wait(PATIENCE) == 75


def _path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _named(rehearsal: Rehearsal, name: str) -> list[Any]:
    return [p for p in rehearsal.workers() if p.name() == name]
