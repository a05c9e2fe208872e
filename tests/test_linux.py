from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume import linux
from tests.patience import PATIENCE


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def exited(pidfd: int, seconds: float = PATIENCE) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


CHILD = """
import os, signal, sys
from autoglm_resume import linux
pid = os.fork()
if pid == 0:
    linux.die_with_parent(os.getppid())
    {extra}
    print(os.getpid(), flush=True)
    signal.pause()
    sys.exit()
signal.pause()
"""


def start(extra: str) -> tuple[subprocess.Popen[str], int]:
    code = CHILD.format(extra=extra)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    return parent, child


def test_a_child_that_asked_for_it_dies_with_its_parent() -> None:
    parent, child = start("pass")
    parent.kill()
    parent.communicate()
    assert exited(child)
    os.close(child)


def test_a_child_that_undid_it_outlives_its_parent() -> None:
    parent, child = start("linux.outlive_parent()")
    parent.kill()
    parent.wait()
    assert not exited(child, 0.3)
    signal.pidfd_send_signal(child, signal.SIGKILL)
    assert exited(child)
    os.close(child)
    parent.communicate()


def test_a_parent_that_is_already_another_one_is_found_out() -> None:
    done = run("from autoglm_resume import linux; linux.die_with_parent(1 << 22); print('alive')")
    assert done.returncode == -signal.SIGKILL
    assert "alive" not in done.stdout


def test_orphans_are_adopted_and_their_exit_codes_are_true() -> None:
    done = run("""
import os
from autoglm_resume import linux
linux.adopt_orphans()
told, tell = os.pipe()
child = os.fork()
if child == 0:
    if os.fork() == 0:
        os.close(told)
        os.write(tell, os.getpid().to_bytes(4, "little"))
        os._exit(7)
    os._exit(0)
os.waitpid(child, 0)
orphan = int.from_bytes(os.read(told, 4), "little")
print(os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]))
""")
    assert done.stdout.strip() == "7", done.stderr


def test_a_watch_names_files_that_appear_grow_or_are_moved_in(tmp_path: Path) -> None:
    watched, other = tmp_path / "watched", tmp_path / "other"
    watched.mkdir()
    other.mkdir()
    watch = linux.DirectoryWatch()
    handle = watch.add(watched)
    assert list(watch.changed()) == []
    with (watched / "a").open("wb") as file:
        assert select.select([watch], [], [], PATIENCE)[0]
        assert set(watch.changed()) == {"a"}
        file.write(b"x")
    assert set(watch.changed()) == {"a"}
    (other / "b").write_text("x")
    (other / "b").rename(watched / "a name of \N{SNOWMAN}")
    assert set(watch.changed()) == {"a name of \N{SNOWMAN}"}
    watch.remove(handle)
    list(watch.changed())
    (watched / "c").write_text("x")
    assert list(watch.changed()) == []
    watch.close()


def test_many_changes_at_once_are_all_named(tmp_path: Path) -> None:
    watch = linux.DirectoryWatch()
    watch.add(tmp_path)
    names = {f"{'n' * 200}{number}" for number in range(500)}
    for name in names:
        (tmp_path / name).touch()
    assert set(watch.changed()) == names
    watch.close()


def test_a_directory_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    watch = linux.DirectoryWatch()
    with pytest.raises(FileNotFoundError) as caught:
        watch.add(tmp_path / "nowhere")
    assert caught.value.filename == str(tmp_path / "nowhere")
    watch.close()


def test_where_no_inotify_is_left_a_watch_looks_for_itself(none_left: tuple[str, ...]) -> None:
    same = [
        test_a_watch_names_files_that_appear_grow_or_are_moved_in,
        test_many_changes_at_once_are_all_named,
        test_a_directory_that_is_not_there_cannot_be_watched,
        test_a_directory_that_goes_away_has_no_more_changes,
    ]
    tests = [f"{__file__}::{test.__name__}" for test in same]
    command = [*none_left, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout


def test_a_directory_that_goes_away_has_no_more_changes(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    watch = linux.DirectoryWatch()
    watch.add(watched)
    watched.rmdir()
    assert not any(watch.changed())
    watch.close()
