from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from autoglm_resume.supervise.base.event_loop import EventLoop, Signals
from tests.patience import soon


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


def test_a_handler_is_called_when_its_descriptor_is_readable(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    heard: list[bytes] = []
    loop.watch(pair[0], lambda: heard.append(pair[0].recv(10)))
    assert not loop.wait(lambda: bool(heard), time.monotonic() + 0.01)
    pair[1].send(b"x")
    assert loop.wait(lambda: bool(heard), soon())
    assert heard == [b"x"]


def test_what_is_forgotten_is_never_called_again(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    loop.watch(pair[0], lambda: pytest.fail("called"))
    loop.forget(pair[0])
    loop.forget(pair[0])
    pair[1].send(b"x")
    loop.run(time.monotonic() + 0.01)


def test_a_closed_socket_can_be_forgotten(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    loop.watch(pair[0], lambda: pytest.fail("called"))
    number = pair[0].fileno()
    pair[0].close()
    loop.forget(pair[0])
    read, write = os.pipe()
    if read != number:
        os.dup2(read, number)
        os.close(read)
    heard: list[int] = []
    loop.watch(number, lambda: heard.append(len(os.read(number, 9))))
    os.write(write, b"abc")
    assert loop.wait(lambda: bool(heard), soon())
    loop.forget(number)
    os.close(number)
    os.close(write)


def test_a_handler_may_close_what_another_one_waits_for(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def handler(mine: int) -> None:
        called.append(mine)
        for ours, theirs in pairs:
            loop.forget(ours)
            ours.close()
            theirs.close()

    for number, (ours, theirs) in enumerate(pairs):
        loop.watch(ours, lambda number=number: handler(number))  # type: ignore[misc]
        theirs.send(b"x")
    loop.run(soon())
    assert len(called) == 1, "both were readable in the same round, and the second was closed"


def test_a_descriptor_number_that_is_used_again_in_the_same_round_is_another_one(
    loop: EventLoop,
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    quiet, never_written = os.pipe()

    def handler() -> None:
        for number, _ in pipes:
            loop.forget(number)
            os.dup2(quiet, number)
            loop.watch(number, lambda: pytest.fail("it has nothing to say"))

    for read, write in pipes:
        loop.watch(read, handler)
        os.write(write, b"x")
    loop.run(soon())
    for number in (*(n for pipe in pipes for n in pipe), quiet, never_written):
        loop.forget(number)
        os.close(number)


def test_timers_fire_again_and_again_until_cancelled(loop: EventLoop) -> None:
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            loop.cancel(tick)

    began = time.monotonic()
    loop.every(0.01, tick)
    assert loop.wait(lambda: len(ticks) == 3, soon())
    assert ticks[2] - began >= 0.03
    assert not loop.wait(lambda: len(ticks) > 3, time.monotonic() + 0.03)


def test_a_timer_may_cancel_another_that_is_due(loop: EventLoop) -> None:
    fired: list[str] = []

    def first() -> None:
        fired.append("first")
        loop.cancel(second)

    def second() -> None:
        fired.append("second")
        loop.cancel(first)

    loop.every(0.01, first)
    loop.every(0.01, second)
    late = threading.Event()
    late.wait(0.02)
    loop.run(soon())
    assert fired == ["first"]


def test_waiting_ends_at_its_deadline_even_with_busy_timers(loop: EventLoop) -> None:
    loop.every(0.001, lambda: None)
    began = time.monotonic()
    assert not loop.wait(lambda: False, began + 0.05)
    assert time.monotonic() - began >= 0.05


def test_a_condition_that_holds_already_needs_no_round(loop: EventLoop) -> None:
    assert loop.wait(lambda: True, time.monotonic() - 1)


@pytest.fixture
def dispositions() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("dispositions")
def test_signals_arrive_in_the_pump_and_not_in_between(loop: EventLoop) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(loop, (signal.SIGUSR1, signal.SIGUSR2), seen.append)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert seen == []
    assert loop.wait(lambda: len(seen) == 2, soon())
    assert sorted(seen) == [signal.SIGUSR1, signal.SIGUSR2]
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_a_signal_wakes_a_pump_that_waits_without_a_deadline(loop: EventLoop) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(loop, (signal.SIGUSR1,), seen.append)
    child = os.fork()
    if child == 0:
        os.kill(os.getppid(), signal.SIGUSR1)
        os._exit(0)
    loop.wait(lambda: bool(seen))
    signals.close()
    os.waitpid(child, 0)
    assert seen == [signal.SIGUSR1]


@pytest.mark.usefixtures("dispositions")
def test_a_flood_of_signals_neither_blocks_nor_warns(loop: EventLoop) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(loop, (signal.SIGUSR1,), seen.append)
    for _ in range(20_000):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.wait(lambda: bool(seen), soon())
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_what_nohup_ignores_stays_ignored(loop: EventLoop) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals(loop, (signal.SIGHUP, signal.SIGUSR1), lambda _: None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_a_signal_repeated_after_the_end_does_not_replace_the_exit_code(loop: EventLoop) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    seen: list[signal.Signals] = []
    signals = Signals(loop, (signal.SIGUSR1, signal.SIGINT), seen.append)
    signals.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.run(time.monotonic() + 0.01)
    assert seen == []
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C is given back"


@pytest.mark.usefixtures("dispositions")
def test_a_signal_between_two_listeners_waits_for_the_next_one(loop: EventLoop) -> None:
    seen: list[signal.Signals] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    Signals(loop, numbers, seen.append).hand_over()
    os.kill(os.getpid(), signal.SIGUSR1)
    signals = Signals(loop, numbers, seen.append)
    assert loop.wait(lambda: bool(seen), soon())
    signals.close()
    assert seen == [signal.SIGUSR1]


@pytest.mark.usefixtures("dispositions")
def test_what_one_listener_has_not_read_or_not_acted_on_is_for_the_next(loop: EventLoop) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[signal.Signals] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    first = Signals(loop, numbers, lambda _: pytest.fail("called"))
    os.kill(os.getpid(), signal.SIGUSR1)
    first.hand_over([signal.SIGUSR2])
    signals = Signals(loop, (*numbers, signal.SIGINT), seen.append)
    loop.wait(lambda: len(seen) >= 2, soon())
    loop.run(time.monotonic() + 0.01)
    signals.close()
    assert seen == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN is not before
