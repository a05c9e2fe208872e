from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autoglm_resume.protocol.shared_memory import Slots, room

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots.create(3 * PAGE, 2)
    yield made
    made.close()


def open_slots() -> int:
    """Descriptors of such memory."""
    gc.collect()  # what earlier tests have left
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # of the listing itself
            count += "autoglm-snapshots" in str(fd.readlink())
    return count


def test_slots_are_apart_and_writable(slots: Slots) -> None:
    first, second = slots.view(0), slots.view(1)
    assert len(first) == len(second) == 3 * PAGE
    first[:] = b"1" * len(first)
    assert bytes(second) == bytes(len(second))
    second[:5] = b"22222"
    assert bytes(first[-5:]) == b"11111"


def test_others_that_have_the_descriptor_see_the_same_memory(slots: Slots) -> None:
    child = os.fork()
    if child == 0:
        Slots(os.dup(slots.fd), slots.size, slots.count).view(1)[:3] = b"hey"
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(slots.view(1)[:3]) == b"hey"


def test_all_of_the_memory_is_there_before_it_is_needed(slots: Slots) -> None:
    assert os.fstat(slots.fd).st_blocks * 512 >= 6 * PAGE
    slots.touch()
    assert bytes(slots.view(1)) == bytes(3 * PAGE)


def test_slots_have_no_name_anywhere(slots: Slots) -> None:
    before = set(Path("/dev/shm").iterdir())
    more = Slots.create(PAGE, 1)
    assert set(Path("/dev/shm").iterdir()) == before
    assert os.fstat(more.fd).st_nlink == 0
    more.close()


def test_memory_stays_while_something_uses_it_and_the_descriptor_does_not() -> None:
    before = open_slots()
    slots = Slots.create(PAGE, 1)
    view = slots.view(0)
    view[:2] = b"ok"
    slots.close()
    assert open_slots() <= before + 1  # the mapping has a descriptor of its own
    assert bytes(view[:2]) == b"ok"
    del view, slots
    assert open_slots() == before


def test_memory_that_cannot_be_had_is_an_error_and_leaves_nothing() -> None:
    before = open_slots()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            Slots.create(1 << 21, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_slots() == before


def test_there_is_no_more_room_than_memory() -> None:
    assert 0 < room() <= psutil.virtual_memory().total
