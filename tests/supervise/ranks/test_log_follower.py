from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm_resume.events import PartSaved, WarningGiven
from autoglm_resume.journal import encode, stamped
from autoglm_resume.output import printable
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.log_follower import AT_ONCE, LONGEST_LINE, LogFollower
from tests.patience import soon

SAVED = stamped(PartSaved(step=5))


class Heard:
    """A follower of a directory and everything it has said."""

    def __init__(self, loop: EventLoop, directory: Path) -> None:
        self.lines: list[tuple[int, str]] = []
        self.events: list[tuple[int, str]] = []
        self.bars: list[tuple[int, str]] = []
        self.follower = LogFollower(
            loop,
            directory,
            lambda rank, text: self.lines.append((rank, text)),
            lambda rank, event: self.events.append((rank, event.event)),
            lambda rank, text: self.bars.append((rank, text)),
        )


@pytest.fixture
def heard(loop: EventLoop, tmp_path: Path) -> Iterator[Heard]:
    return Heard(loop, tmp_path)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_lines_and_events_come_as_they_are_written(
    heard: Heard, loop: EventLoop, tmp_path: Path
) -> None:
    append(tmp_path / "rank-12.log", b"hello\n")
    assert loop.wait(lambda: len(heard.lines) == 1, soon())
    append(tmp_path / "rank-0.events.jsonl", encode(SAVED))
    assert loop.wait(lambda: len(heard.events) == 1, soon())
    append(tmp_path / "rank-12.log", b"again\r\n")
    assert loop.wait(lambda: len(heard.lines) == 2, soon())
    heard.follower.close()
    assert heard.lines == [(12, "hello"), (12, "again")]
    assert heard.events == [(0, "saved")]


def test_half_a_line_waits_for_its_end_and_the_last_one_is_shown_at_the_end(
    heard: Heard, tmp_path: Path
) -> None:
    log, events = tmp_path / "rank-0.log", tmp_path / "rank-0.events.jsonl"
    line = encode(SAVED)
    append(log, b"one\ntw")
    append(events, line[:10])
    heard.follower.drain()
    assert heard.lines == [(0, "one")]
    append(log, b"o\nthr")
    append(events, line[10:] + line[:4])
    heard.follower.drain()
    heard.follower.drain()
    assert heard.lines == [(0, "one"), (0, "two")]
    heard.follower.close()
    assert heard.lines == [(0, "one"), (0, "two"), (0, "thr")]
    assert heard.events == [(0, "saved")]


def test_other_files_are_nobodys_lines(heard: Heard, tmp_path: Path) -> None:
    for name in ("rank-x.log", "rank-0.log.old", "torchrun.log", "rank-0.error.json"):
        append(tmp_path / name, b"text\n")
    append(tmp_path / "rank-0.log", b"\xff\xfe text\n")
    heard.follower.close()
    assert heard.lines == [(0, "\\xff\\xfe text")]


def test_while_quiet_lines_wait_and_events_come_through(heard: Heard, tmp_path: Path) -> None:
    heard.follower.quiet = True
    append(tmp_path / "rank-0.log", b"one\n")
    append(tmp_path / "rank-0.events.jsonl", encode(SAVED))
    heard.follower.drain()
    assert (heard.lines, heard.events) == ([], [(0, "saved")])
    heard.follower.quiet = False
    heard.follower.close()
    assert heard.lines == [(0, "one")]


def test_a_flood_is_shortened_and_says_by_how_much(heard: Heard, tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    append(log, b"first\nhalf")
    heard.follower.drain()
    flood = b"".join(b"%07d\n" % n for n in range(100_000))
    append(log, b" a line\n" + flood)
    heard.follower.drain()
    heard.follower.close()
    texts = [text for _, text in heard.lines]
    size = len(b" a line\n" + flood)
    assert texts[:3] == ["first", "half", f"[{size - AT_ONCE} bytes not shown, see rank-0.log]"]
    assert texts[-1] == "0099999"
    assert len(texts) == 3 + AT_ONCE // 8


def test_events_are_never_shortened(heard: Heard, tmp_path: Path) -> None:
    line = encode(WarningGiven(text="." * 1000))
    append(tmp_path / "rank-0.events.jsonl", line * (2 * AT_ONCE // len(line)))
    heard.follower.close()
    assert len(heard.events) == 2 * AT_ONCE // len(line)


def test_a_line_without_end_is_cut_and_does_not_fill_the_memory(
    heard: Heard, tmp_path: Path
) -> None:
    log = tmp_path / "rank-0.log"
    for _ in range(5):
        append(log, b"." * LONGEST_LINE)
        heard.follower.drain()
    append(log, b"\nnext\n")
    heard.follower.close()
    assert heard.lines[-1] == (0, "next")
    assert all(len(text) <= LONGEST_LINE for _, text in heard.lines)
    assert len(heard.lines) > 2, "it is shown before its end, which may never come"


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20), max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_however_writes_are_cut_every_line_comes_once_and_whole(
    loop: EventLoop, tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    heard = Heard(loop, directory)
    data = "".join(line + "\n" for line in lines).encode()
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        append(directory / "rank-3.log", data[start:end])
        heard.follower.drain()
    heard.follower.close()
    assert heard.lines == [(3, line) for line in lines]


def test_a_progress_bar_is_told_state_by_state_and_is_a_line_when_it_is_over(
    heard: Heard, tmp_path: Path
) -> None:
    log = tmp_path / "rank-0.log"
    for state in (b"\r 10%|#  |", b"\r 20%|## |\r 30%|## |", b"\r 40%|### |\r"):
        append(log, state)
        heard.follower.drain()
    assert [printable(text) for _, text in heard.bars] == [" 10%|#  |", " 30%|## |", " 40%|### |"]
    assert heard.lines == []
    append(log, b"\r100%|####|\nsaved\n")
    heard.follower.close()
    assert [printable(text) for _, text in heard.lines] == ["100%|####|", "saved"]


def test_a_bar_below_another_does_not_make_a_line_of_every_state(
    heard: Heard, tmp_path: Path
) -> None:
    log = tmp_path / "rank-0.log"
    append(log, b"\router 0%")
    for step in range(100):
        append(log, b"\n\rinner %d%%\x1b[A\router 1%%" % step)
        heard.follower.drain()
    append(log, b"\n\n")
    heard.follower.close()
    assert len(heard.lines) <= 2
    assert printable(heard.bars[-1][1]) == "outer 1%"


def test_the_longest_bar_takes_no_memory(heard: Heard, tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    append(log, b"".join(b"\r%6d of 1000000" % n for n in range(10_000)))
    heard.follower.drain()
    assert len(heard.bars) == 1
    assert heard.lines == []
    append(log, b"\n")
    heard.follower.close()
    assert [printable(text) for _, text in heard.lines] == ["  9999 of 1000000"]
