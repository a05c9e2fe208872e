"""What reading and proving share: plain reads, stat fingerprints, and work on several cores."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from autoglm_resume import files
from autoglm_resume.checkpoint.format.part import Part
from autoglm_resume.checkpoint.format.tables import Chunk, Fingerprint
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint

Progress: TypeAlias = "Callable[[int], None]"
"""Called with the number of bytes done since the last call, from any thread."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: CorruptCheckpoint only if no such file is there.

    No permission or a failing disk says nothing about the bytes.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CorruptCheckpoint(f"{file}: expected a file, found none") from None
    except files.UnfitFile as error:
        raise CorruptCheckpoint(f"{file}: {error.strerror}") from None
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


def on_one_part(
    part: Part, read: Callable[[Part, Chunk, memoryview, str], None], progress: Progress | None
) -> None:
    """`read` every chunk that `part` has itself, wherever it lies, and those that it casts.

    Raises CheckpointError naming the file.
    """
    chunks = [(i, chunk) for i, chunk in enumerate(part.chunks) if not chunk.with_peer]

    def verify(index: int, buffer: memoryview) -> None:
        number, chunk = chunks[index]
        read(part, chunk, buffer[: chunk.raw], f"chunk {number}")
        if progress:
            progress(chunk.stored)

    largest = max((chunk.raw for _, chunk in chunks), default=0)
    on_threads(len(chunks), verify, lambda: memoryview(bytearray(largest)))


def on_threads(
    count: int,
    work: Callable[[int, memoryview], None],
    scratch: Callable[[], memoryview],
    threads: int = 2,
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
