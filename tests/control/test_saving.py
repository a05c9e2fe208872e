from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.control import saving
from autoglm_resume.control.saving import Request
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.journal import Journal, stamped
from autoglm_resume.locks import Holder
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.stops import SAVE
from tests.observe.runs import Script, directory
from tests.patience import PATIENCE

_CONTEXT = multiprocessing.get_context("fork")

Said = list[tuple[str, dict[str, Any]]]

OLDER = ("committed", {"step": 20, "id": "older"})
ASKED = ("save_requested", {"step": 33})
SAVED = ("committed", {"step": 33, "id": "step-0000000033.a0"})


def _supervise(path: Path, answer: Said, obey: bool, ready: Callable[[], object]) -> None:
    with RunDirectory(path).locked() as lock:
        lock.describe("")
        if obey:
            signal.pthread_sigmask(signal.SIG_BLOCK, [SAVE])
            signal.signal(SAVE, lambda *_: None)
        ready()
        if not obey:
            signal.pause()
        signal.sigwait([SAVE])
        journal = Journal(path / "events.jsonl")
        for event, fields in answer:
            journal.append(stamped(events.read({"event": event, **fields})))


def held(path: Path, answer: Said, *, obey: bool = True) -> BaseProcess:
    """A process that holds the run, answers one request so in its journal, and ends."""
    ready = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_supervise, args=(path, answer, obey, ready.set))
    process.start()
    assert ready.wait(PATIENCE)
    return process


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(directory(tmp_path / "demo", Script().life().save(0, 20).events))


def ask(run: RunDirectory, answer: Said) -> events.Committed:
    supervisor = held(run.path, answer)
    holder = run.holder()
    assert holder
    try:
        return saving.save(run, holder)
    finally:
        supervisor.join(PATIENCE)


def test_the_save_that_was_asked_for_is_waited_for(run: RunDirectory) -> None:
    assert ask(run, [OLDER, ASKED, OLDER, SAVED]).id == "step-0000000033.a0"


def test_a_save_that_failed_says_why(run: RunDirectory) -> None:
    failed = ("save_failed", {"rank": 1, "step": 33, "reason": "no space left"})
    with pytest.raises(AutoglmError, match="rank 1 could not save step 33: no space left"):
        ask(run, [ASKED, failed])


def test_a_supervisor_that_ends_meanwhile_is_not_waited_for(run: RunDirectory) -> None:
    with pytest.raises(AutoglmError, match="its supervisor ended before it was saved"):
        ask(run, [ASKED])


def test_ranks_that_cannot_save_now_say_so(run: RunDirectory) -> None:
    refused = ("save_requested", {"step": None, "reason": "the ranks are starting"})
    with pytest.raises(AutoglmError, match="not saved: the ranks are starting"):
        ask(run, [refused])


def test_a_supervisor_that_would_die_of_the_signal_is_spared(run: RunDirectory) -> None:
    supervisor = held(run.path, [], obey=False)
    holder = run.holder()
    assert holder
    with pytest.raises(AutoglmError, match="just starting"):
        saving.save(run, holder)
    assert supervisor.is_alive()
    supervisor.terminate()
    supervisor.join(PATIENCE)
    with pytest.raises(AutoglmError, match="has just ended"):
        saving.save(run, holder)


def test_a_run_of_another_host_cannot_be_asked_here(run: RunDirectory) -> None:
    with pytest.raises(UsageError, match="elsewhere") as refused:
        saving.save(run, Holder(os.getpid(), "elsewhere", 0.0))
    assert "autoglm save" in refused.value.hint


def heard(*told: tuple[str, dict[str, Any]]) -> Request:
    request = Request()
    for event, fields in told:
        request.hear(events.read({"event": event, **fields}))
    return request


def test_a_step_that_was_announced_anew_replaces_the_first() -> None:
    request = heard(ASKED, ("save_requested", {"step": 40}), SAVED)
    assert not request.settled
    request.hear(events.Committed(step=41, id="later"))
    assert request.saved
    assert request.saved.id == "later"


def test_nothing_counts_before_the_request_is_heard() -> None:
    failed = ("save_failed", {"rank": 0, "step": 33, "reason": "x"})
    assert not heard(failed, SAVED, ("failure", {"step": 33})).settled


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ("attempt_started", "restarted"),
        ("run_completed", "complete"),
        ("run_interrupted", "stopped"),
        ("run_failed", "failed"),
    ],
)
def test_what_ends_the_ranks_ends_the_wait(event: str, problem: str) -> None:
    assert problem in heard(ASKED, (event, {"attempt": 1, "step": 30})).problem
    # A rank's death alone does not: the gate may yet commit what is whole.
    assert heard(ASKED, ("attempt_ended", {}), ("failure", {"step": 33}), SAVED).saved
