"""A rank's connection to its saver: who it is, slots to copy into, and what became of a save."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.assignment import HOME
from autoglm_resume.protocol.saver_messages import Closed, Message
from autoglm_resume.protocol.shared_memory import Slots
from autoglm_resume.worker.base.settings import Settings

PATIENCE = 10.0
"""Seconds for a saver to appear and to answer what takes it no time."""


class NoSaver(Exception):
    """There is no saver, or it died, or it has no memory to give; the message says which."""


class SaverClient:
    """One connection; after it broke, `hello` makes another, to the saver's successor."""

    def __init__(self, settings: Settings, name: str | None) -> None:
        """`name` is the saver's; without one, this process starts its own."""
        self._settings = settings
        self._name = name
        self._link: socket.socket | None = None
        self.slots: Slots | None = None
        self.on_slots: Callable[[Slots], None] = lambda slots: None
        """Called with new slots, before they are used."""
        self.before_close: Callable[[Slots], None] = lambda slots: None
        self.short: str = ""
        """Why there are fewer slots than were asked for."""

    def hello(self) -> Message:
        """Connect; returns what the saver says of the snapshots it has. Raises NoSaver."""
        self.close()
        self._link = self._connect()
        self.send(
            {
                "op": "hello",
                "rank": self._settings.rank,
                "world_size": self._settings.world_size,
                "checkpoint": asdict(self._settings.checkpoint),
                "resume": self._settings.resume.id if self._settings.resume else None,
            }
        )
        deadline = time.monotonic() + PATIENCE
        while (reply := self.receive(deadline - time.monotonic())) is None:
            if time.monotonic() > deadline:
                self.close()  # its late answer must not be taken for another
                raise NoSaver(f"the saver did not answer within {PATIENCE:.0f} s")
        return reply

    @property
    def connected(self) -> bool:
        return self._link is not None

    def send(self, message: Message) -> None:
        """Raises NoSaver."""
        if self._link is None:
            raise NoSaver("there is no connection to a saver")
        try:
            saver_messages.send(self._link, message)
        except Closed:
            raise self._lost() from None

    def receive(self, seconds: float) -> Message | None:
        """The next message within `seconds`; slots that come are mapped. Raises NoSaver."""
        if self._link is None:
            raise NoSaver("there is no connection to a saver")
        try:
            found = saver_messages.receive(self._link, wait=False)
            if found is None and seconds > 0:
                select.select([self._link], [], [], seconds)
                found = saver_messages.receive(self._link, wait=False)
        except Closed:
            raise self._lost() from None
        if found is None:
            return None
        message, fd = found
        if message["op"] == "slots":
            self.short = message.get("reason", "")
            if not message["count"]:
                self._drop_slots()
        if fd is not None:
            self._drop_slots()
            self.slots = Slots(fd, message["bytes"], message["count"])
            self.on_slots(self.slots)
        return message

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _lost(self) -> NoSaver:
        self.close()
        self._drop_slots()
        return NoSaver("the saver died")

    def _drop_slots(self) -> None:
        if self.slots is not None:
            self.before_close(self.slots)
            self.slots.close()
            self.slots = None

    def _connect(self) -> socket.socket:
        if self._name is None:
            return _start()
        deadline = time.monotonic() + PATIENCE
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                link.connect(saver_messages.address(self._name))
            except ConnectionRefusedError:
                link.close()
                if time.monotonic() > deadline:
                    raise NoSaver(f"no saver listens at @{self._name}") from None
                time.sleep(0.01)  # it, or its successor, is about to
            else:
                return link


def _start() -> socket.socket:
    """A saver of this process's own; it ends when this one has, and its last save is done."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, contextlib.suppress(OSError):
        subprocess.Popen(
            [
                *(sys.executable, "-m", "autoglm_resume.savers.saver_process"),
                str(theirs.fileno()),
            ],
            cwd=HOME,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return ours
