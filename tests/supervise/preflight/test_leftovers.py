"""Real processes that carry the mark of a run, or only look as if."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoglm_resume import linux
from autoglm_resume.protocol.assignment import ASSIGNMENT, RUN
from autoglm_resume.supervise.preflight import leftovers

WAIT = "print(flush=True); import signal; signal.pause()"
ORPHAN = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", {WAIT!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that is not below this one, with these variables; its pid."""
    started: list[int] = []
    linux.adopt_orphans(adopt=False)  # another test may have had it so

    def orphan(**variables: str) -> int:
        done = subprocess.run(
            [sys.executable, "-S", "-c", ORPHAN],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        started.append(int(done.stdout))
        return started[-1]

    yield orphan
    for pid in started:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "demo"
    path.mkdir(parents=True)
    return path


def test_what_a_run_left_behind_is_found_and_ended(run: Path, start: Start) -> None:
    marked = start(**{RUN: str(run)})
    assigned = start(**{ASSIGNMENT: f"{run}/attempts/003/assignment.json"})
    found = leftovers.find(run)
    assert {process.pid for process in found} == {marked, assigned}
    assert leftovers.described(found[0]).startswith(f"process {found[0].pid} (python")
    assert leftovers.end(found, run) == []
    assert leftovers.find(run) == []


def test_others_are_never_touched(run: Path, start: Start) -> None:
    other = run.with_name("demo-2")
    other.mkdir()
    start()
    start(**{RUN: str(other)})
    start(**{ASSIGNMENT: f"{other}/attempts/003/assignment.json"})
    start(**{"NOTE": f"{RUN}={run}"})
    assert leftovers.find(run) == []


def test_our_own_children_and_parents_are_no_leftovers(run: Path) -> None:
    code = (
        "import subprocess, sys; from pathlib import Path\n"
        "from autoglm_resume.supervise.preflight import leftovers\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {WAIT!r}], stdout=-1)\n"
        "child.stdout.readline()\n"
        f"print(leftovers.find(Path({str(run)!r})))\n"
        "child.kill(); child.communicate()"
    )
    inner = [sys.executable, "-c", code]
    outer = [sys.executable, "-c", f"import subprocess; subprocess.run({inner!r})"]
    done = subprocess.run(
        outer, env={**os.environ, RUN: str(run)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_one_that_changed_hands_since_it_was_found_is_spared(run: Path, start: Start) -> None:
    start(**{RUN: str(run)})
    found = leftovers.find(run)
    elsewhere = run.with_name("other")
    elsewhere.mkdir()
    assert not leftovers.belongs(found[0].pid, elsewhere)
    leftovers.ENDING_SECONDS, before = 0.1, leftovers.ENDING_SECONDS
    try:
        assert leftovers.end(found, elsewhere) == found
    finally:
        leftovers.ENDING_SECONDS = before
    assert leftovers.find(run) == found


def test_a_process_that_is_gone_has_no_name() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert leftovers.name_of(process.pid) == "?"
