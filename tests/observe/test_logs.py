from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.observe import logs
from autoglm_resume.supervise.base.run_directory import RunDirectory
from tests.patience import PATIENCE


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path)
    for attempt in (0, 1):
        made.attempt(attempt).mkdir(parents=True)
        for rank in (0, 1):
            (made.attempt(attempt) / f"rank-{rank}.log").write_text(f"a{attempt} r{rank}\n")
    return made


def test_the_newest_attempt_is_shown_in_rank_order(
    run: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    logs.show(run, None, None)
    assert capfdbinary.readouterr().out == b"[rank 0] a1 r0\n[rank 1] a1 r1\n"


def test_one_rank_of_one_attempt_is_shown_as_it_was_written(
    run: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (run.attempt(0) / "rank-1.log").write_bytes(b"\xff\x1b[31m\nno newline")
    logs.show(run, 1, 0)
    assert capfdbinary.readouterr().out == b"\xff\x1b[31m\nno newline\n"


def test_what_does_not_exist_is_said(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no attempt 7; found 0 to 1"):
        logs.show(run, None, 7)
    with pytest.raises(UsageError, match="no log of rank 9"):
        logs.show(run, 9, None)
    with pytest.raises(UsageError, match="no attempt was started yet"):
        logs.show(RunDirectory(tmp_path / "none"), None, None)


def test_following_a_run_that_is_over_prints_it_and_ends(
    run: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    logs.follow(run, None, None)
    assert b"a1 r1" in capfdbinary.readouterr().out


def _hold(path: Path, ready: Callable[[], object], work: list[tuple[float, str, str]]) -> None:
    run = RunDirectory(path)
    with run.locked() as lock:
        lock.describe("")
        ready()
        for pause, file, text in work:
            time.sleep(pause)
            (path / "attempts" / file).parent.mkdir(exist_ok=True)
            with (path / "attempts" / file).open("a") as log:
                log.write(text)
        time.sleep(0.1)


def test_following_goes_on_to_the_next_attempt_and_ends_with_the_run(
    run: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    work = [
        (0.1, "001/rank-0.log", "half "),
        (0.1, "001/rank-0.log", "line\n"),
        (0.1, "002/rank-1.log", "next\n"),
    ]
    supervisor = context.Process(target=_hold, args=(run.path, ready.set, work))
    supervisor.start()
    assert ready.wait(PATIENCE)
    follower = threading.Thread(target=logs.follow, args=(run, None, None))
    follower.start()
    follower.join(PATIENCE)
    supervisor.join(PATIENCE)
    assert not follower.is_alive()
    out, err = capfdbinary.readouterr()
    expected = [b"[rank 0] a1 r0", b"[rank 1] a1 r1", b"[rank 0] half line", b"[rank 1] next"]
    assert out.splitlines() == expected
    assert b"attempt 2" in err


def test_all_attempts_are_shown_one_after_the_other(
    run: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    logs.show_earlier(run, 0)
    logs.show(run, 0, None)
    out, err = capfdbinary.readouterr()
    assert out.splitlines() == [b"a0 r0", b"a1 r0"]
    assert err == b"autoglm: attempt 0\nautoglm: attempt 1\n"
