"""A pack's bytes against its chunk table: streaming, in bounded memory, on several cores."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from autoglm_resume.checkpoint import codec
from autoglm_resume.checkpoint.document import digest
from autoglm_resume.checkpoint.part import Chunk, Fingerprint
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

Progress: TypeAlias = "Callable[[int], None]"
"""Called with the number of bytes done since the last call, from any thread."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: CorruptCheckpoint only if `file` is not there.

    No permission or a failing disk says nothing about the bytes.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CorruptCheckpoint(f"{file}: expected a file, found none") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def fingerprint(path: Path | int) -> Fingerprint:
    """Of a file, or of an open file descriptor."""
    found = os.stat(path)  # noqa: PTH116 - a Path cannot stat a descriptor
    return Fingerprint(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def read_exactly(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` of the file; returns the bytes read, fewer at the file's end."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_chunk(fd: int, chunk: Chunk, target: memoryview, place: str) -> None:
    """Fill `target` (of `chunk.raw` bytes) with the decoded chunk, and verify its digest.

    Raises CorruptCheckpoint beginning with `place`; `target` then holds garbage.
    """
    if chunk.codec == codec.RAW:
        count = read_exactly(fd, target, chunk.offset) if chunk.stored == chunk.raw else 0
    else:
        stored = memoryview(bytearray(chunk.stored))
        count = read_exactly(fd, stored, chunk.offset)
        if count == chunk.stored:
            target[:] = codec.decode(chunk.codec, stored, chunk.raw)
    if count != chunk.stored:
        raise CorruptCheckpoint(
            f"{place}: expected {chunk.stored} bytes at offset {chunk.offset}, found {count}"
        )
    found = digest(target)
    if found != chunk.digest:
        raise CorruptCheckpoint(
            f"{place}: expected {chunk.digest}, found {found}"
            f" ({chunk.stored} bytes at offset {chunk.offset})"
        )


def verify_pack(
    path: Path,
    chunks: Sequence[Chunk],
    *,
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """Read the whole pack and check every chunk.

    Raises CorruptCheckpoint naming the file, or OSError when it cannot be read.
    """
    size = chunks[-1].offset + chunks[-1].stored if chunks else 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (found := os.fstat(fd).st_size) != size:
            raise CorruptCheckpoint(f"{path}: expected {size} bytes, found {found}")

        def verify(index: int, buffer: memoryview) -> None:
            chunk = chunks[index]
            read_chunk(fd, chunk, buffer[: chunk.raw], f"{path}: chunk {index}")
            if progress:
                progress(chunk.stored)

        largest = max((chunk.raw for chunk in chunks), default=0)
        on_threads(len(chunks), verify, lambda: memoryview(bytearray(largest)), threads)
    finally:
        os.close(fd)


def on_threads(
    count: int,
    work: Callable[[int, memoryview], None],
    scratch: Callable[[], memoryview],
    threads: int,
) -> None:
    """`work(i, buffer)` for i below `count`; each thread has one buffer of its own.

    Each thread takes the next index that is free, so they stay close together in the file. The
    first error stops all and is raised here. (concurrent.futures costs the CLI 10 ms to import.)
    """
    errors: list[BaseException] = []
    indices = iter(range(count))
    lock = threading.Lock()

    def loop() -> None:
        buffer = scratch()
        try:
            while not errors:
                with lock:
                    index = next(indices, None)
                if index is None:
                    return
                work(index, buffer)
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=loop) for _ in range(min(threads, count) - 1)]
    for helper in helpers:
        helper.start()
    loop()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
