"""What a script sees of itself: the same as under python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.protocol.assignment import Assignment
from tests.worker.test_rank import Make, run

NAMES = """
print(sorted(globals()), type(__builtins__).__name__, getattr(__spec__, "name", 0), __package__)
"""
FIELDS = """
import argparse
from dataclasses import dataclass, fields

@dataclass
class Config:
    lr: float = 0.1
    steps: int = 3

parser = argparse.ArgumentParser()
for field in fields(Config):
    parser.add_argument("--" + field.name, type=field.type, default=field.default)
print(parser.parse_args(["--lr", "3e-4", "--steps", "5"]), Config.__annotations__)
"""
SOURCE = """
import inspect, linecache
def f():
    return 1
print(inspect.getsource(f), __loader__.name, __loader__.get_source("__main__")[:7])
"""
PICKLED = """
import copy, pickle
class Mine:
    pass
print(type(pickle.loads(pickle.dumps(Mine()))) is Mine, copy.deepcopy(Mine), Mine.__module__)
"""
LATE = """
import threading, time, atexit, pickle
class Mine:
    pass
def late():
    threading.main_thread().join()
    print("thread", type(pickle.loads(pickle.dumps(Mine()))) is Mine)
threading.Thread(target=late).start()
atexit.register(lambda: print("handler", pickle.loads(pickle.dumps(Mine)) is Mine))
"""


@pytest.mark.parametrize("text", [NAMES, FIELDS, SOURCE, PICKLED, LATE])
def test_a_script_sees_what_it_sees_under_python(assign: Make, text: str) -> None:
    ended = run(assign(text))
    alone = _python(ended.assignment, str(ended.assignment.source.script))
    assert (ended.code, ended.log) == (0, alone)


@pytest.mark.parametrize("text", [NAMES, FIELDS, PICKLED, LATE])
@pytest.mark.parametrize("package", [False, True])
def test_a_module_sees_what_it_sees_under_python(assign: Make, text: str, package: bool) -> None:
    assignment = assign(module="mine")
    root = Path(assignment.source.workdir)
    (root / "mine").mkdir()
    (root / "mine/__init__.py").touch()
    (root / "mine/__main__.py" if package else root / "mine.py").write_text(text)
    if not package:
        (root / "mine/__init__.py").unlink()
    ended = run(assignment)
    assert (ended.code, ended.log) == (0, _python(assignment, "-m", "mine"))


def test_a_module_that_cannot_be_run_says_why(assign: Make) -> None:
    ended = run(assign(module="mine"))
    assert ended.code == 1
    assert ended.log.endswith("ModuleNotFoundError: No module named 'mine'\n")
    assert "autoglm_resume" not in ended.log
    assignment = assign(module="mine")
    (Path(assignment.source.workdir) / "mine").mkdir(exist_ok=True)
    (Path(assignment.source.workdir) / "mine/__init__.py").touch()
    ended = run(assignment)
    assert "'mine' is a package and cannot be directly executed" in ended.log


def _python(assignment: Assignment, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=assignment.source.workdir,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
