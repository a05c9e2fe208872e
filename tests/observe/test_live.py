from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import time
from collections.abc import Iterator

import pytest

from autoglm_resume.events import read
from autoglm_resume.observe import live
from autoglm_resume.observe.live import Screen


class Pipes:
    """A screen whose two outputs are pipes, or one terminal."""

    def __init__(self, *, terminal: bool = False, json: bool = False) -> None:
        if terminal:
            self.readers, writer = zip(*[pty.openpty()], strict=True)
            fcntl.ioctl(writer[0], termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
            self.writers = (writer[0], writer[0])
        else:
            self.readers, self.writers = zip(os.pipe(), os.pipe(), strict=True)
        self.screen = Screen("all", json=json, out=self.writers[0], err=self.writers[1])

    def read(self) -> list[str]:
        """What each output got so far."""
        found = []
        for reader in self.readers:
            os.set_blocking(reader, False)
            data = b""
            try:
                while piece := os.read(reader, 65536):
                    data += piece
            except BlockingIOError:
                pass
            found.append(data.decode().replace("\r\n", "\n"))
        return found

    def close(self) -> None:
        for fd in {*self.readers, *self.writers}:
            os.close(fd)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    made = Pipes()
    yield made
    made.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipes]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = Pipes(terminal=True)
    yield made
    made.close()


def test_ranks_print_on_standard_output_and_sentences_on_standard_error(pipes: Pipes) -> None:
    pipes.screen.worker_line(1, "loss 2.5")
    pipes.screen.event(read({"event": "failure", "summary": "rank 1 died"}))
    assert pipes.read() == ["[rank 1] loss 2.5\n", "autoglm: rank 1 died\n"]


def test_with_json_nothing_but_the_document_is_on_standard_output() -> None:
    pipes = Pipes(json=True)
    pipes.screen.worker_line(0, "hello")
    assert pipes.read() == ["", "[rank 0] hello\n"]
    pipes.close()


def test_the_console_shows_what_the_job_asks_for(pipes: Pipes) -> None:
    pipes.screen.console = "rank0"
    pipes.screen.worker_line(0, "zero")
    pipes.screen.worker_line(1, "one")
    pipes.screen.console = "none"
    pipes.screen.worker_line(0, "again")
    assert pipes.read()[0] == "[rank 0] zero\n"


def test_a_reader_that_left_costs_lines_and_never_an_error() -> None:
    out, err = os.pipe(), os.pipe()
    screen = Screen(out=out[1], err=err[1])
    os.close(out[0])
    for _ in range(3):
        screen.worker_line(0, "x" * 100_000)
    screen.event(read({"event": "run_completed", "step": 1}))
    assert os.read(err[0], 100).startswith(b"autoglm: run completed")
    for fd in (out[1], *err):
        os.close(fd)


def test_a_descriptor_that_is_closed_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    Screen(out=write, err=write).worker_line(0, "hello")


def test_a_reader_that_does_not_read_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_PATIENCE", 1)
    pipes = Pipes()
    began = time.monotonic()
    for _ in range(200):
        pipes.screen.worker_line(0, "x" * 4000)
    assert time.monotonic() - began < 2
    pipes.read()
    pipes.screen.worker_line(0, "after")
    text = pipes.read()[0]
    assert "pieces of output were not shown" in text
    assert text.endswith("[rank 0] after\n")
    pipes.close()


def test_bytes_that_are_no_text_are_shown_as_well_as_they_can(pipes: Pipes) -> None:
    pipes.screen.worker_line(0, b"\xff\xfe caf\xc3\xa9")
    assert pipes.read()[0] == "[rank 0] \ufffd\ufffd café\n"


def test_the_live_line_stays_at_the_bottom_and_fits(terminal: Pipes) -> None:
    terminal.screen.status(41, rate=12.3, loss=2.5, last_checkpoint=40, attempt=1, total=200)
    first = terminal.read()[0]
    assert "step 41/200 · loss 2.5 · 12.3 steps/s · checkpoint" in first
    assert len(first.split("\x1b[2m")[1].removesuffix("\x1b[0m")) == 59
    terminal.screen.worker_line(0, "hello")
    second = terminal.read()[0]
    assert second.index("\r\x1b[2K") < second.index("hello\n") < second.index("step 41/200")
    terminal.screen.close()
    assert terminal.read()[0] == "\r\x1b[2K"
    terminal.screen.worker_line(0, "after")
    assert "step 41" not in terminal.read()[0]


def test_before_the_first_step_the_live_line_says_starting(terminal: Pipes) -> None:
    terminal.screen.status(-1, loss=float("nan"))
    assert "autoglm: starting\x1b" in terminal.read()[0]


def test_drills_failures_and_success_have_their_colours(terminal: Pipes) -> None:
    terminal.screen.event(read({"event": "failure", "summary": "died"}))
    terminal.screen.event(read({"event": "drill", "kind": "kill", "rank": 1}))
    terminal.screen.event(read({"event": "run_completed", "step": 1}))
    terminal.screen.event(read({"event": "save_cut_off", "step": 60, "missing": [1]}))
    failure, drill, success, cut_off = terminal.read()[0].splitlines()
    assert "\x1b[31mdied" in failure
    assert "\x1b[35mdrill: " in drill
    assert "\x1b[32mrun completed" in success
    assert "\x1b[2msave of step 60 cut off" in cut_off, "a restart is told of already"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, terminal: Pipes) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.screen.worker_line(0, "\x1b[31mred")
    assert terminal.read()[0] == "[rank 0] red\n"


def test_without_a_terminal_the_status_is_a_line_now_and_then(pipes: Pipes) -> None:
    for step in range(1, 100):
        pipes.screen.status(step)
    assert pipes.read()[1] == "autoglm: step 1\n"


def test_a_traceback_is_marked_with_its_rank(pipes: Pipes) -> None:
    pipes.screen.traceback(1, TRACE)
    pipes.screen.last()
    lines = pipes.read()[1].splitlines()
    assert lines[0] == "autoglm: rank 1 failed first:"
    assert lines[-1] == "[rank 1] ValueError: no"


TRACE = 'Traceback (most recent call last):\n  File "train.py", line 3\nValueError: no\n'


def fail(screen: Screen, action: str) -> None:
    """Both ranks print the same traceback, rank 1 has failed first, and `action` is decided."""
    for line in TRACE.splitlines():
        for rank in (0, 1):
            screen.worker_line(rank, line)
    screen.worker_line(0, "the last words of rank 0")
    screen.traceback(1, TRACE)
    screen.event(read({"event": "decision", "action": action, "reason": "it died"}))


def test_of_many_tracebacks_one_is_shown_and_of_a_run_that_ends_as_the_last_thing(
    pipes: Pipes,
) -> None:
    fail(pipes.screen, "give_up")
    out, err = pipes.read()
    assert out == "[rank 0] the last words of rank 0\n"
    assert err == "autoglm: giving up: it died\n"
    pipes.screen.close()
    pipes.screen.last()
    out, err = pipes.read()
    assert out == ""
    head, *trace = err.splitlines()
    assert head == "autoglm: rank 1 failed first; what rank 0 raised is in the logs:"
    assert trace == [f"[rank 1] {line}" for line in TRACE.splitlines()]


def test_a_run_that_goes_on_shows_a_traceback_before_that_and_the_same_one_only_once(
    pipes: Pipes,
) -> None:
    fail(pipes.screen, "restart")
    lines = pipes.read()[1].splitlines()
    assert lines[-2:] == ["[rank 1] ValueError: no", "autoglm: restarting at once: it died"]
    fail(pipes.screen, "restart")
    assert pipes.read()[1].splitlines() == [
        "autoglm: rank 1 failed first, with the same traceback",
        "autoglm: restarting at once: it died",
    ]
    fail(pipes.screen, "give_up")
    pipes.screen.last()
    assert pipes.read()[1].endswith("[rank 1] ValueError: no\n"), "the last thing, all the same"


def test_tracebacks_that_ended_nothing_are_shown(pipes: Pipes) -> None:
    for line in TRACE.splitlines():
        pipes.screen.worker_line(0, line)
    assert pipes.read()[0] == ""
    pipes.screen.event(read({"event": "attempt_ended", "outcome": "completed", "step": 3}))
    shown = "".join(f"[rank 0] {line}\n" for line in TRACE.splitlines())
    assert pipes.read()[0] == shown


def test_a_full_disk_costs_lines_and_never_an_error() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    screen = Screen(out=full, err=full)
    for _ in range(3):
        screen.worker_line(0, "hello")
    os.close(full)


def test_a_bar_of_rank_0_is_the_live_line_until_it_is_over(terminal: Pipes) -> None:
    terminal.screen.status(41)
    terminal.read()
    terminal.screen.bar(0, "\r 40%|###   |")
    assert " 40%|###   |" in terminal.read()[0]
    terminal.screen.bar(1, "\r 99%|##### |")
    assert terminal.read()[0] == "", "one bar is enough"
    terminal.screen.status(42)
    assert " 40%|###   |" in terminal.read()[0]
    terminal.screen.worker_line(0, "\r100%|######|")
    shown = terminal.read()[0]
    assert shown.index("100%|######|") < shown.index("step 42")


def test_without_a_terminal_a_bar_is_a_line_now_and_then(pipes: Pipes) -> None:
    for percent in range(100):
        pipes.screen.bar(0, f"\r{percent:3}%")
    assert pipes.read() == ["[rank 0]   0%\n", ""]


def test_saves_that_fail_of_one_cause_are_told_once_and_counted(pipes: Pipes) -> None:
    def fails(step: int, reason: str) -> None:
        for rank in (0, 1):
            event = {"event": "save_failed", "rank": rank, "step": step}
            pipes.screen.event(read({**event, "reason": reason.format(step=step, rank=rank)}))

    for step in (10, 20, 30):
        fails(step, "/c/step-{step}/rank-{rank}.pack: No space left on device")
    pipes.screen.event(read({"event": "committed", "rank": 0, "id": "x", "step": 40}))
    fails(50, "/c/step-{step}/rank-{rank}.pack: No space left on device")
    pipes.screen.close()
    lines = pipes.read()[1].splitlines()
    assert [line.removeprefix("autoglm: ").partition(":")[0] for line in lines] == [
        "rank 0 could not save step 10",
        "2 more saves had failed of the same cause",
        "checkpoint step 40 committed",
        "rank 0 could not save step 50",
    ]


def test_the_first_ctrl_c_says_what_a_second_does(pipes: Pipes) -> None:
    pipes.screen.event(read({"event": "stop_requested", "by": "SIGINT"}))
    pipes.screen.event(read({"event": "stop_requested", "by": "SIGTERM"}))
    first, other = pipes.read()[1].splitlines()
    assert "a second Ctrl-C stops at once" in first
    assert "Ctrl-C" not in other
