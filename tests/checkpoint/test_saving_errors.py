"""What becomes of a save when the storage fails, or lies."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.checkpoint.chunks import direct_io
from autoglm_resume.checkpoint.format.options import SaveOptions
from autoglm_resume.checkpoint.format.tables import CHUNK_BYTES
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write import pack_writer, part_writer
from autoglm_resume.checkpoint.write.part_writer import PartWriter, SaveFailed
from tests.checkpoint.series import assert_holds, files_in, series, taken


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt")


class Flushing:
    """os.fdatasync that goes wrong `times` times."""

    def __init__(self, times: int, error: int) -> None:
        self.times, self.error = times, error
        self.real: Callable[[int], None] = os.fdatasync

    def __call__(self, fd: int) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.error, os.strerror(self.error))
        self.real(fd)


@pytest.mark.parametrize("times", [1, 2])
def test_an_error_that_passes_costs_only_another_try(
    store: Store, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (0.0, 0.0))
    monkeypatch.setattr(os, "fdatasync", Flushing(times, errno.EIO))
    (tensors,) = series(1)
    assert_holds(store, PartWriter(store).persist(taken(1, tensors)).part.id, tensors)


@pytest.mark.parametrize(("error", "tries"), [(errno.EIO, 3), (errno.ENOSPC, 1), (errno.EACCES, 1)])
def test_one_that_stays_is_reported_and_one_that_cannot_pass_is_not_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: int, tries: int
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (0.0, 0.0))
    flushing = Flushing(100, error)
    monkeypatch.setattr(os, "fdatasync", flushing)
    first, second = series(2)
    with pytest.raises(SaveFailed, match=os.strerror(error)) as caught:
        PartWriter(store).persist(taken(1, first))
    assert "rank-00000.pack: not saved" in caught.value.message
    assert flushing.times == 100 - tries
    assert files_in(store.root) == []
    monkeypatch.undo()
    assert_holds(store, PartWriter(store).persist(taken(2, second)).part.id, second)


def test_nobody_waits_for_another_try_of_a_save_that_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "RETRIES", (1e9,))
    given_up = threading.Event()

    def flush(fd: int) -> None:
        given_up.set()
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(os, "fdatasync", flush)
    with pytest.raises(SaveFailed):
        PartWriter(store).persist(taken(1, next(series(1))), given_up)


class Lying:
    """os.fdatasync of a disk that changes byte `place` of the `number`th file flushed."""

    def __init__(self, place: int) -> None:
        self.place, self.done = place, False
        self.real: Callable[[int], None] = os.fdatasync

    def __call__(self, fd: int) -> None:
        self.real(fd)
        if not self.done and os.fstat(fd).st_size > self.place:
            self.done = True
            with Path(f"/proc/self/fd/{fd}").open("r+b") as file:
                file.seek(self.place)
                byte = file.read(1)
                file.seek(self.place)
                file.write(bytes([byte[0] ^ 16]))


@pytest.mark.parametrize("compress", ["off", "fast", "small"])
@pytest.mark.parametrize("place", [0, 300_000, 700_000])
def test_a_disk_that_gives_back_other_bytes_is_found_out_before_the_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch, compress: Any, place: int
) -> None:
    monkeypatch.setattr(pack_writer, "WINDOW_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 16 * direct_io.BLOCK)
    old, new, newer = series(3)
    one = PartWriter(store, SaveOptions(compress))
    before = one.persist(taken(1, old)).part
    if compress == "small":
        place //= 8  # what follows is smaller
    lying = Lying(place)
    monkeypatch.setattr(os, "fdatasync", lying)
    with pytest.raises(SaveFailed, match="reading it back: "):
        one.persist(taken(2, new))
    assert lying.done
    assert store.latest() == store.directory(before.id)
    assert_holds(store, one.persist(taken(3, newer)).part.id, newer)
