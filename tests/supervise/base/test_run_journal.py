"""The journal as its one writer and its readers meet it: torn lines and full disks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_resume.events import Event, FirstStep, OfRank, WarningGiven
from autoglm_resume.journal import Journal, decode, encode, read, stamped
from autoglm_resume.worker.base.event_log import EventLog


def note(n: int, more: str = "") -> Event:
    """An event with a number."""
    return stamped(WarningGiven(text=f"{n} {more}"))


def number(event: Event) -> int:
    assert isinstance(event, WarningGiven)
    return int(event.text.partition(" ")[0])


def numbers(path: Path) -> list[int]:
    return list(map(number, read(path)))


def fill(path: Path) -> None:
    """Take every byte that is left on the file system of `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1 << 14, 1):
        try:
            while True:
                os.write(fd, b"\0" * size)
        except OSError:
            continue
    os.close(fd)


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    for n in range(3):
        event = note(n)
        assert journal.append(event) is event
    journal.close()
    assert numbers(path) == [0, 1, 2]
    assert read(path)[-1] == event
    assert read(tmp_path / "none") == []


def test_a_torn_last_line_is_isolated(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    torn = encode(note(1))
    path.write_bytes(encode(note(0)) + torn[: len(torn) // 2])
    journal = Journal(path)
    journal.append(note(2))
    journal.close()
    assert numbers(path) == [0, 2]
    journal = Journal(path)
    journal.append(note(3))
    journal.close()
    assert numbers(path) == [0, 2, 3]
    assert path.read_bytes().count(b"\n\n") == 0


def test_no_prefix_of_a_journal_makes_a_reader_raise(tmp_path: Path) -> None:
    data = b"".join(encode(note(n, "\N{SNOWMAN}\r\u2028")) for n in range(3))
    for end in range(len(data)):
        events = list(decode(data[:end]))
        assert list(map(number, events)) == list(range(len(events)))
    assert list(map(number, decode(data))) == [0, 1, 2]


@pytest.mark.parametrize("line", [b"[" * 100_000, b"{}", b"1", b'{"event": 1}', b"\xff", b""])
def test_foreign_lines_are_skipped(line: bytes) -> None:
    assert list(map(number, decode(line + b"\n" + encode(note(5))))) == [5]


def test_a_full_disk_neither_stops_the_writer_nor_loses_order(
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(64)
    path, ballast = disk / "events.jsonl", disk / "ballast"
    journal = Journal(path)
    journal.append(note(0))
    assert not journal.behind
    fill(ballast)
    for n in range(1, 200):
        journal.append(note(n))
    assert journal.behind
    written = len(numbers(path))
    assert written < 200
    assert numbers(path) == list(range(written)), "what is there is whole and in order"
    ballast.unlink()
    journal.append(note(200))
    assert not journal.behind
    assert numbers(path) == list(range(201))
    journal.close()


def test_lines_that_wait_for_room_go_out_when_the_journal_is_closed(
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(64)
    path, ballast = disk / "events.jsonl", disk / "ballast"
    journal = Journal(path)
    fill(ballast)
    for n in range(100):
        journal.append(note(n))
    ballast.unlink()
    journal.close()
    assert numbers(path) == list(range(100))


def test_a_ranks_event_after_a_full_disk_is_not_lost(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    path, ballast = disk / "rank-0.events.jsonl", disk / "ballast"
    events = EventLog(path, 0)
    events.emit(WarningGiven(text="." * 4000))
    fill(ballast)
    events.emit(WarningGiven(text="." * 4000))
    ballast.unlink()
    events.emit(FirstStep(step=2))
    assert [event.event for event in read(path)] == ["warning", "first_step"]


def test_events_of_ranks_go_out_at_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    children = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            events = EventLog(path, rank)
            for n in range(200):
                events.emit(WarningGiven(text=f"{n} " + "." * rank * 200))
            os.kill(os.getpid(), signal.SIGKILL)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    found = read(path)
    assert len(found) == 800
    for rank in range(4):
        own = [event for event in found if isinstance(event, OfRank) and event.rank == rank]
        assert list(map(number, own)) == list(range(200))


def test_events_without_a_file_go_nowhere() -> None:
    EventLog(None, 0).emit(FirstStep(step=2))
