from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.savers.directory_lock import persisting, settled

HOLDER = """
import sys
from pathlib import Path
from autoglm_resume.savers.directory_lock import persisting
with persisting(Path(sys.argv[1])):
    print("begun", flush=True)
    sys.stdin.readline()
    Path(sys.argv[2]).touch()
"""

ASKS = """
import sys
from pathlib import Path
from autoglm_resume.savers.directory_lock import settled
with settled(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
"""


def holder(root: Path, ended: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), str(ended)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_whoever_asks_whether_all_is_settled_waits_for_all_that_persist(
    tmp_path: Path, how: str
) -> None:
    root = tmp_path / "not" / "there"
    first, second = (holder(root, tmp_path / name) for name in ("first", "second"))
    first.communicate("end")
    asks = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(root), str(tmp_path / "settled")],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asks.stderr is not None
    assert "waiting for the last process's save" in asks.stderr.readline()
    assert not (tmp_path / "settled").exists()
    if how == "killed":
        second.kill()
    second.communicate("end" if how == "by itself" else None)
    asks.communicate()
    assert (tmp_path / "first").exists()
    assert (tmp_path / "second").exists() == (how == "by itself")
    assert (tmp_path / "settled").exists()


def test_where_nothing_was_ever_saved_nobody_waits_and_nothing_is_made(tmp_path: Path) -> None:
    with settled(tmp_path / "nothing"):
        assert not (tmp_path / "nothing").exists()


def test_a_place_that_cannot_be_made_is_not_this_ones_business(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with persisting(tmp_path / "file"), settled(tmp_path / "file"):
        pass
    with persisting(tmp_path / "file" / "below"):
        pass
