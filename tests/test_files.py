from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from autoglm_resume import files
from tests.patience import soon


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_a_file_appears_whole_and_nothing_else_does(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"one")
    files.write(tmp_path / "a", b"two", durable=False)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(("umask", "usual"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_as_the_umask_says_and_a_private_one_its_owners(
    tmp_path: Path, umask: int, usual: int
) -> None:
    before = os.umask(umask)
    try:
        files.write(tmp_path / "usual", b"")
        with files.writing(tmp_path / "private", private=True) as file:
            assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600, "from the first byte on"
    finally:
        os.umask(before)
    assert (tmp_path / "usual").stat().st_mode & 0o777 == usual
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_the_old_content_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with files.writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_content(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write() -> None:
        with files.writing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_existing_file_wins_where_it_must_not_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        files.write(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_of_two_writers_that_must_not_replace_exactly_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        path = tmp_path / str(round_)
        children = []
        for name in (b"a", b"b"):
            pid = os.fork()
            if pid == 0:
                try:
                    files.write(path, name * 1000, replace=False, durable=False)
                except FileExistsError:
                    os._exit(1)
                os._exit(0)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert sorted(codes) == [0, 1]
        winner = (b"a", b"b")[codes.index(0)]
        assert path.read_bytes() == winner * 1000


def test_a_writer_killed_in_the_middle_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.writing(path) as file:
            file.write(b"half" * 10_000)
            file.flush()
            os.write(tell, b"1")
            signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(tell)
    assert path.read_bytes() == b"old"
    left = [name for name in names(tmp_path) if name != "a"]
    assert len(left) == 1
    assert left[0].startswith(files.TEMPORARY)


def cached(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 1 << 19, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


def test_what_is_read_ahead_is_in_memory_soon_and_what_is_not_there_harms_nobody(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pack"
    files.write(path, b"a" * (1 << 20))
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps everything in memory")
    files.read_ahead([tmp_path / "missing", path])
    deadline = soon()
    while not cached(path):
        assert time.monotonic() < deadline


def test_only_regular_files_of_a_size_that_can_be_meant_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert files.read(tmp_path / "link", 5) == b"12345"
    with pytest.raises(files.UnfitFile, match="expected at most 4 bytes, found 5"):
        files.read(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    for path, found in (
        (tmp_path / "pipe", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (Path("/dev/tty"), "a device"),
    ):
        with pytest.raises(files.UnfitFile, match=f"expected a regular file, found {found}"):
            files.read(path, 5)
    with pytest.raises(IsADirectoryError):
        files.read(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none", 5)
