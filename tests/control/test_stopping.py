from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from autoglm_resume.control import stopping
from autoglm_resume.errors import AutoglmError, UsageError
from autoglm_resume.locks import Holder
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.observe.runs import Script, directory, killed_once
from tests.patience import PATIENCE

_CONTEXT = multiprocessing.get_context("fork")


def _hold(path: Path, ready: Callable[[], object]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    with RunDirectory(path).locked() as lock:
        lock.describe("")
        ready()
        signal.pause()


def held(path: Path) -> BaseProcess:
    """A process that holds the run until it gets SIGTERM."""
    ready = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_hold, args=(path, ready.set))
    process.start()
    assert ready.wait(PATIENCE)
    return process


def test_the_supervisor_gets_sigterm_and_is_waited_for(tmp_path: Path) -> None:
    run = RunDirectory(directory(tmp_path / "demo", Script().life().events))
    supervisor = held(run.path)
    holder = run.holder()
    assert holder
    with stopping.asked(run, holder) as process:
        stopping.wait(process)
    supervisor.join(PATIENCE)
    assert supervisor.exitcode == 75
    assert run.holder() is None


def test_a_run_of_another_host_cannot_be_stopped_here(tmp_path: Path) -> None:
    there = Holder(os.getpid(), "elsewhere", 0.0)
    with (
        pytest.raises(UsageError, match="elsewhere"),
        stopping.asked(RunDirectory(tmp_path), there),
    ):
        pass


def test_a_number_that_another_process_has_now_is_never_signalled(tmp_path: Path) -> None:
    run = RunDirectory(directory(tmp_path / "demo", Script().life().events))
    supervisor = held(run.path)
    holder = run.holder()
    assert holder
    # This very process: were it signalled, the tests would end here.
    stale = Holder(os.getpid(), holder.host, 0.0)
    with pytest.raises(AutoglmError, match="just starting"), stopping.asked(run, stale):
        pass
    supervisor.terminate()
    supervisor.join(PATIENCE)
    with stopping.asked(run, stale) as process:
        assert process is None


def test_a_supervisor_that_is_gone_already_is_no_error(tmp_path: Path) -> None:
    process = _CONTEXT.Process(target=lambda: None)
    process.start()
    process.join(PATIENCE)
    assert process.pid
    gone = Holder(process.pid, os.uname().nodename, 0.0)
    with stopping.asked(RunDirectory(tmp_path), gone) as found:
        stopping.wait(found)


def test_the_outcome_says_what_is_saved(tmp_path: Path) -> None:
    def said(name: str, script: Script) -> str:
        return stopping.outcome(RunDirectory(directory(tmp_path / name, script.events)))

    saved = Script().life().attempt(0).save(0, 57).say("run_interrupted", code=75, step=57)
    assert said("a", saved).endswith("stopped, saved at step 57")
    assert said("b", killed_once()).endswith("finished at step 10")
    uncounted = Script().life().say("run_completed", step=-1)
    assert said("d", uncounted).endswith("finished")
    assert said("c", Script().life()).endswith("nothing was saved")
