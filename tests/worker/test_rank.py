"""A cold rank: `python -m autoglm_resume.worker.rank`, as the supervisor starts it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import autoglm_resume
from autoglm_resume.events import RankEnded, RankStarted
from autoglm_resume.journal import read
from autoglm_resume.protocol.assignment import Assignment
from autoglm_resume.protocol.heartbeats import Board, Phase
from tests.patience import PATIENCE

HOME = Path(autoglm_resume.__file__).parent.parent
Make = Callable[..., Assignment]


class Ended(NamedTuple):
    code: int
    log: str
    error: dict[str, Any] | None
    assignment: Assignment


def start(assignment: Assignment, rank: int = 0, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "autoglm_resume.worker.rank"],
        cwd=HOME,
        env={**os.environ, **assignment.rank_environment(rank), **environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def run(assignment: Assignment, rank: int = 0, **environment: str) -> Ended:
    code = start(assignment, rank, **environment).wait(PATIENCE)
    error = assignment.error(rank)
    return Ended(
        code,
        assignment.log(rank).read_text(),
        json.loads(error.read_text()) if error.exists() else None,
        assignment,
    )


@pytest.mark.parametrize(
    ("text", "code", "log"),
    [
        ("print('done')", 0, "done\n"),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(None)", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit(-1)", 255, ""),
        ("import sys; sys.exit(True)", 1, ""),
        ("import sys; sys.exit('too bad')", 1, "too bad\n"),
        ("raise SystemExit(75)", 75, ""),
        ("import os; os._exit(9)", 9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import os; print(os.read(0, 10))", 0, "b''\n"),
    ],
)
def test_the_exit_code_is_that_of_the_script(assign: Make, text: str, code: int, log: str) -> None:
    ended = run(assign(text))
    assert (ended.code, ended.log, ended.error) == (code, log, None)


FAILS = """
def deep():
    raise ValueError("bad \\N{SNOWMAN} number")

def main():
    deep()

main()
"""


def test_an_exception_is_recorded_as_the_script_alone_would_show_it(assign: Make) -> None:
    ended = run(assign(FAILS))
    script = ended.assignment.source.script
    alone = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.code == alone.returncode == 1
    assert ended.error is not None
    assert ended.error["traceback"] == ended.log == alone.stderr
    assert (ended.error["rank"], ended.error["type"]) == (0, "ValueError")
    assert ended.error["message"] == "bad \N{SNOWMAN} number"
    assert ended.error["mono"] > 0
    events = [event.event for event in read(ended.assignment.events(0))]
    assert events == ["rank_started", "rank_ended", "rank_finished"]
    assert getattr(read(ended.assignment.events(0))[1], "code", None) == 1


def test_what_autoglm_refuses_a_script_is_told_in_a_sentence_and_recorded_as_that(
    assign: Make,
) -> None:
    text = "import autoglm_resume as autoglm\nautoglm.init().track(number=7)"
    ended = run(assign(text))
    assert ended.code == 2
    said = "session.track(number=…): int has no state_dict() and load_state_dict()"
    assert ended.log.startswith(f"autoglm: error: {said} (train.py:2)\nhint: ")
    assert ended.log.count("\n") == 2
    assert ended.error is not None
    assert (ended.error["misused"], ended.error["message"]) == (True, said)
    assert ended.error["hint"]
    ended = run(assign("import autoglm_resume as autoglm\nautoglm.init()\nautoglm.init()"))
    assert (ended.code, "init() was called before in this rank" in ended.log) == (2, True)
    mine = "from autoglm_resume.errors import UsageError\nraise UsageError('mine')"
    ended = run(assign(mine))
    assert ended.code == 1
    assert ended.error is not None
    assert not ended.error["misused"], "the script's own"


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e",
        "class MyError(Exception): ...\nraise MyError",
        "raise RuntimeError('x' * 100_000)",
        "import no_such_module_anywhere",
        "raise OSError(2, 'nothing', '\\udcff')",
        "class Bad(Exception):\n    def __str__(self): raise TypeError\nraise Bad()",
    ],
)
def test_exceptions_of_all_kinds_are_recorded(assign: Make, text: str) -> None:
    ended = run(assign(text))
    assert ended.code == 1
    assert ended.error is not None
    assert ended.error["traceback"][-1000:].strip() in ended.log
    assert len(ended.error["traceback"]) < 200_000
    assert "autoglm_resume" not in ended.log
    events = [event.event for event in read(ended.assignment.events(0))]
    assert events[-2:] == ["rank_ended", "rank_finished"]


def test_a_syntax_error_is_shown_as_python_shows_it(assign: Make) -> None:
    ended = run(assign("x = = 1"))
    assert ended.code == 1
    assert ended.error is not None
    assert ended.error["type"] == "SyntaxError"
    assert "x = = 1" in ended.log
    assert "autoglm_resume" not in ended.log


def test_ctrl_c_ends_with_130_and_says_so(assign: Make) -> None:
    ended = run(assign("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass"))
    assert ended.code == 130
    assert ended.error is not None
    assert ended.error["type"] == "KeyboardInterrupt"


MAIN = """
import atexit, json, os, pickle, sys
import helper
import __main__

def double(x):
    return 2 * x

if __name__ == "__main__":
    atexit.register(lambda: print("at exit", double(2), __main__.double(3)))
    import multiprocessing
    assert pickle.loads(pickle.dumps(double)) is double
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.map(double, [21])
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "file": __file__, "cwd": os.getcwd(),
        "main": __main__.double is double, "spawned": spawned, "rank": os.environ["RANK"],
        "session": os.getsid(0) == os.getpid(), "helper": helper.HERE,
        "mine": os.environ["MINE"],
    }))
"""


def test_the_script_is_main_as_under_python(assign: Make) -> None:
    assignment = assign(MAIN, args=("--lr", "0.1"), world_size=2, environment={"MINE": "set"})
    script = Path(str(assignment.source.script))
    (script.parent / "helper.py").write_text("HERE = __file__")
    ended = run(assignment, rank=1)
    assert ended.code == 0, ended.log
    first, last = ended.log.splitlines()
    assert json.loads(first) == {
        "argv": [str(script), "--lr", "0.1"],
        "path": str(script.parent),
        "file": str(script),
        "cwd": assignment.source.workdir,
        "main": True,
        "spawned": [42],
        "rank": "1",
        "session": True,
        "helper": str(script.parent / "helper.py"),
        "mine": "set",
    }
    assert last == "at exit 4 6"


def test_a_linked_script_finds_its_neighbours(assign: Make, tmp_path: Path) -> None:
    assignment = assign("placeholder")
    script = Path(str(assignment.source.script))
    real = tmp_path / "real"
    real.mkdir()
    (real / "neighbour.py").write_text("")
    (real / "train.py").write_text("import neighbour")
    script.unlink()
    script.symlink_to(real / "train.py")
    assert subprocess.run([sys.executable, str(script)]).returncode == 0
    assert run(assignment).code == 0


def test_a_module_runs_as_with_dash_m(assign: Make) -> None:
    assignment = assign(module="package.train", args=("a", "b"))
    package = Path(assignment.source.workdir) / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("X = 5")
    (package / "train.py").write_text(
        "import json, sys\nfrom .other import X\nimport atexit\n"
        "atexit.register(lambda: print('at exit', X))\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([sys.argv, sys.path[0], __package__, __spec__.name]))\n"
    )
    ended = run(assignment)
    assert ended.code == 0, ended.log
    first, last = ended.log.splitlines()
    assert json.loads(first) == [
        [str(package / "train.py"), "a", "b"],
        assignment.source.workdir,
        "package",
        "package.train",
    ]
    assert last == "at exit 5"


FORKS = """
import atexit, os, sys
atexit.register(lambda: print("exit handlers of", "the helper" if child == 0 else "the rank"))
child = os.fork()
if child == 0:
    HELPER
print("helper ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("helper", "code"),
    [("sys.exit(3)", 3), ("sys.exit()", 0), ("raise ValueError('helper')", 1), ("os._exit(4)", 4)],
)
def test_a_process_that_the_script_forks_does_not_speak_for_the_rank(
    assign: Make, helper: str, code: int
) -> None:
    ended = run(assign(FORKS.replace("HELPER", helper)))
    assert (ended.code, ended.error) == (0, None)
    assert f"helper ended with {code}\n" in ended.log
    alone = subprocess.run(
        [sys.executable, str(ended.assignment.source.script)], capture_output=True, text=True
    )
    assert sorted(ended.log.splitlines()) == sorted((alone.stdout + alone.stderr).splitlines())
    found = [event for event in read(ended.assignment.events(0)) if isinstance(event, RankEnded)]
    assert [event.code for event in found] == [0]


def test_a_helper_that_leaves_the_loop_saves_nothing(assign: Make, tmp_path: Path) -> None:
    text = """
import os, pathlib, sys, torch
import autoglm_resume as autoglm
session = autoglm.init(checkpoint_dir="checkpoints")
session.track(model=torch.nn.Linear(2, 1))
for step in session.steps(3):
    if step == 1:
        child = os.fork()
        if child == 0:
            break
        assert os.waitpid(child, 0)[1] == 0
        assert not list(pathlib.Path("checkpoints").glob("step-*"))
"""
    script = str(assign(text).source.script)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint" not in done.stderr


def test_output_is_in_the_log_while_the_rank_runs_and_after_sigkill(assign: Make) -> None:
    assignment = assign(
        "import os, sys, time\nprint('line')\nprint('error', file=sys.stderr)\n"
        "os.kill(os.getpid(), 9)"
    )
    ended = run(assignment)
    assert (ended.code, ended.log) == (-signal.SIGKILL, "line\nerror\n")


def test_a_crash_in_c_leaves_the_python_stack_in_the_log(assign: Make) -> None:
    ended = run(assign("import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()"))
    assert ended.code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.log
    assert "in crash" in ended.log


def test_a_rank_says_that_it_started_and_beats_without_a_phase(assign: Make) -> None:
    assignment = assign("print('up')", world_size=2)
    process = start(assignment, rank=1)
    process.wait(PATIENCE)
    started = read(assignment.events(1))[0]
    assert isinstance(started, RankStarted)
    assert (started.rank, started.pid) == (1, process.pid)
    board = Board.open(Path(assignment.board))
    assert board.beat(1).pid == process.pid
    assert board.beat(1).phase is Phase.NONE
    assert board.beat(0).pid == 0
    board.close()


def test_a_rank_ends_with_its_supervisor(assign: Make, tmp_path: Path) -> None:
    """The supervisor here is a process of its own, which starts the rank and is killed."""
    supervisor = os.fork()
    if supervisor == 0:
        try:
            assignment = assign("import signal; print('up'); signal.pause()")
            rank = start(assignment)
            (tmp_path / "pid").write_text(str(rank.pid))
            while b"up" not in assignment.log(0).read_bytes() if assignment.log(0).exists() else 1:
                pass
        finally:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
    os.waitid(os.P_PID, supervisor, os.WSTOPPED | os.WNOWAIT)
    try:
        pidfd = os.pidfd_open(int((tmp_path / "pid").read_text()))
        assert not select.select([pidfd], [], [], 0)[0]
    finally:
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)


def test_a_rank_whose_supervisor_is_gone_already_does_not_begin(assign: Make) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assignment = assign("open('began', 'w')", supervisor=gone.pid)
    assert start(assignment).wait(PATIENCE) == -signal.SIGKILL
    assert not (Path(assignment.source.workdir) / "began").exists()
