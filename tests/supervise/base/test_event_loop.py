from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from autoglm_resume.supervise.base.event_loop import Pump, Signals


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


def soon() -> float:
    return time.monotonic() + 10


def test_a_handler_is_called_when_its_descriptor_is_readable(
    pump: Pump, pair: tuple[socket.socket, socket.socket]
) -> None:
    heard: list[bytes] = []
    pump.watch(pair[0], lambda: heard.append(pair[0].recv(10)))
    assert not pump.wait(lambda: bool(heard), time.monotonic() + 0.01)
    pair[1].send(b"x")
    assert pump.wait(lambda: bool(heard), soon())
    assert heard == [b"x"]


def test_what_is_forgotten_is_never_called_again(
    pump: Pump, pair: tuple[socket.socket, socket.socket]
) -> None:
    pump.watch(pair[0], lambda: pytest.fail("called"))
    pump.forget(pair[0])
    pump.forget(pair[0])
    pair[1].send(b"x")
    pump.run(time.monotonic() + 0.01)


def test_a_closed_socket_can_be_forgotten(
    pump: Pump, pair: tuple[socket.socket, socket.socket]
) -> None:
    pump.watch(pair[0], lambda: pytest.fail("called"))
    number = pair[0].fileno()
    pair[0].close()
    pump.forget(pair[0])
    read, write = os.pipe()
    if read != number:
        os.dup2(read, number)
        os.close(read)
    heard: list[int] = []
    pump.watch(number, lambda: heard.append(len(os.read(number, 9))))
    os.write(write, b"abc")
    assert pump.wait(lambda: bool(heard), soon())
    pump.forget(number)
    os.close(number)
    os.close(write)


def test_a_handler_may_close_what_another_one_waits_for(pump: Pump) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def handler(mine: int) -> None:
        called.append(mine)
        for ours, theirs in pairs:
            pump.forget(ours)
            ours.close()
            theirs.close()

    for number, (ours, theirs) in enumerate(pairs):
        pump.watch(ours, lambda number=number: handler(number))  # type: ignore[misc]
        theirs.send(b"x")
    pump.run(soon())
    assert len(called) == 1, "both were readable in the same round, and the second was closed"


def test_a_descriptor_number_that_is_used_again_in_the_same_round_is_another_one(
    pump: Pump,
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    quiet, never_written = os.pipe()

    def handler() -> None:
        for number, _ in pipes:
            pump.forget(number)
            os.dup2(quiet, number)
            pump.watch(number, lambda: pytest.fail("it has nothing to say"))

    for read, write in pipes:
        pump.watch(read, handler)
        os.write(write, b"x")
    pump.run(soon())
    for number in (*(n for pipe in pipes for n in pipe), quiet, never_written):
        pump.forget(number)
        os.close(number)


def test_timers_fire_again_and_again_until_cancelled(pump: Pump) -> None:
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            pump.cancel(tick)

    began = time.monotonic()
    pump.every(0.01, tick)
    assert pump.wait(lambda: len(ticks) == 3, soon())
    assert ticks[2] - began >= 0.03
    assert not pump.wait(lambda: len(ticks) > 3, time.monotonic() + 0.03)


def test_a_timer_may_cancel_another_that_is_due(pump: Pump) -> None:
    fired: list[str] = []

    def first() -> None:
        fired.append("first")
        pump.cancel(second)

    def second() -> None:
        fired.append("second")
        pump.cancel(first)

    pump.every(0.01, first)
    pump.every(0.01, second)
    late = threading.Event()
    late.wait(0.02)
    pump.run(soon())
    assert fired == ["first"]


def test_waiting_ends_at_its_deadline_even_with_busy_timers(pump: Pump) -> None:
    pump.every(0.001, lambda: None)
    began = time.monotonic()
    assert not pump.wait(lambda: False, began + 0.05)
    assert 0.05 <= time.monotonic() - began < 5


def test_a_condition_that_holds_already_needs_no_round(pump: Pump) -> None:
    assert pump.wait(lambda: True, time.monotonic() - 1)


@pytest.fixture
def dispositions() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("dispositions")
def test_signals_arrive_in_the_pump_and_not_in_between(pump: Pump) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(pump, (signal.SIGUSR1, signal.SIGUSR2), seen.append)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert seen == []
    assert pump.wait(lambda: len(seen) == 2, soon())
    assert sorted(seen) == [signal.SIGUSR1, signal.SIGUSR2]
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_a_signal_wakes_a_pump_that_waits_without_a_deadline(pump: Pump) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(pump, (signal.SIGUSR1,), seen.append)
    child = os.fork()
    if child == 0:
        os.kill(os.getppid(), signal.SIGUSR1)
        os._exit(0)
    pump.wait(lambda: bool(seen))
    signals.close()
    os.waitpid(child, 0)
    assert seen == [signal.SIGUSR1]


@pytest.mark.usefixtures("dispositions")
def test_a_flood_of_signals_neither_blocks_nor_warns(pump: Pump) -> None:
    seen: list[signal.Signals] = []
    signals = Signals(pump, (signal.SIGUSR1,), seen.append)
    for _ in range(20_000):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert pump.wait(lambda: bool(seen), soon())
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_what_nohup_ignores_stays_ignored(pump: Pump) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals(pump, (signal.SIGHUP, signal.SIGUSR1), lambda _: None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signals.close()


@pytest.mark.usefixtures("dispositions")
def test_a_signal_repeated_after_the_end_does_not_replace_the_exit_code(pump: Pump) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    seen: list[signal.Signals] = []
    signals = Signals(pump, (signal.SIGUSR1, signal.SIGINT), seen.append)
    signals.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    pump.run(time.monotonic() + 0.01)
    assert seen == []
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C is given back"


@pytest.mark.usefixtures("dispositions")
def test_a_signal_between_two_listeners_waits_for_the_next_one(pump: Pump) -> None:
    seen: list[signal.Signals] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    Signals(pump, numbers, seen.append).hand_over()
    os.kill(os.getpid(), signal.SIGUSR1)
    signals = Signals(pump, numbers, seen.append)
    assert pump.wait(lambda: bool(seen), soon())
    signals.close()
    assert seen == [signal.SIGUSR1]


@pytest.mark.usefixtures("dispositions")
def test_what_one_listener_has_not_read_or_not_acted_on_is_for_the_next(pump: Pump) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[signal.Signals] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    first = Signals(pump, numbers, lambda _: pytest.fail("called"))
    os.kill(os.getpid(), signal.SIGUSR1)
    first.hand_over([signal.SIGUSR2])
    signals = Signals(pump, (*numbers, signal.SIGINT), seen.append)
    pump.wait(lambda: len(seen) >= 2, soon())
    pump.run(time.monotonic() + 0.01)
    signals.close()
    assert seen == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN is not before
