"""Files past the page cache."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoglm_resume.checkpoint.chunks import direct_io
from autoglm_resume.checkpoint.chunks.direct_io import BLOCK, BUFFER_BYTES, Input, Output

CONTENT = bytes(range(251)) * (3 * BUFFER_BYTES // 251)


def written(path: Path, sizes: Sequence[int]) -> bytes:
    """What was written, in pieces of these sizes."""
    data = memoryview(CONTENT)[: sum(sizes)]
    with path.open("xb") as file:
        output = Output(file.fileno())
        done = 0
        for size in sizes:
            output.write(data[done : done + size])
            done += size
            assert done - BUFFER_BYTES < output.end <= done
        output.finish()
        assert output.end == done
    return bytes(data)


def direct_here(path: Path) -> bool:
    """Whether the file system takes it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        return direct_io._File(fd).direct
    finally:
        os.close(fd)
        path.unlink()


@pytest.fixture(params=["disk", "memory", "refused", "refused late"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A directory, where the page cache can be passed by, and where it cannot."""
    if request.param == "memory":
        with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
            yield Path(root)
        return
    if request.param == "refused":
        real = direct_io.fcntl.fcntl

        def refuse(fd: int, command: int, argument: int = 0) -> Any:
            if argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no")
            return real(fd, command, argument)

        monkeypatch.setattr(direct_io.fcntl, "fcntl", refuse)
    elif request.param == "refused late":
        for name in ("write", "preadv"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    yield tmp_path


def refusing(real: Callable[..., int]) -> Callable[..., int]:
    """As file systems do that only look at the flag when something is to be written."""

    def call(fd: int, *arguments: Any) -> int:
        if direct_io.fcntl.fcntl(fd, direct_io.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(fd, *arguments)

    return call


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [1],
        [BLOCK],
        [BLOCK - 1, 2],
        [BUFFER_BYTES],
        [BUFFER_BYTES + 1],
        [7, 2 * BUFFER_BYTES + BLOCK, 0, 5000],
    ],
    ids=str,
)
def test_what_is_written_is_what_is_read_anywhere(place: Path, sizes: list[int]) -> None:
    path = place / "file"
    data = written(path, sizes)
    assert path.read_bytes() == data
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.close(fd)
    with closing(Input(path, 1 << 20)) as source:
        for start in range(0, len(data), 999_983):
            size = min(1 << 20, len(data) - start)
            assert source.read(start, size) == data[start : start + size]


@given(
    length=st.integers(0, 3 * BLOCK),
    reads=st.lists(st.tuples(st.integers(0, 4 * BLOCK), st.integers(0, 2 * BLOCK))),
)
@example(length=BLOCK, reads=[(BLOCK, 1), (2 * BLOCK, BLOCK), (0, 2 * BLOCK)])
@settings(max_examples=60)
def test_any_piece_can_be_read_and_ends_where_the_file_does(
    tmp_path_factory: pytest.TempPathFactory, length: int, reads: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "file"
    data = written(path, [length])
    with closing(Input(path, 2 * BLOCK)) as source:
        for offset, size in reads:
            assert source.read(offset, size) == data[offset : offset + size]


def test_reading_goes_to_the_storage_where_the_file_system_has_one(tmp_path: Path) -> None:
    if not direct_here(tmp_path / "trial"):
        pytest.skip("no way past the page cache here")
    path = tmp_path / "file"
    data = written(path, [BUFFER_BYTES + 1])
    with closing(Input(path, len(data))) as source:
        assert source.read(0, len(data)) == data
        assert source._file.direct


def test_other_errors_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left")

    with (tmp_path / "file").open("xb") as file:
        output = Output(file.fileno())
        output.write(b"one")
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            output.finish()
    with pytest.raises(FileNotFoundError):
        Input(tmp_path / "none", 1)
