"""The saver: a process of low priority that persists one rank's snapshots and outlives the rank.

    python -m autoglm_resume.savers.saver_process FD [PARENT NAME]

FD is a socket to whoever started it: the supervisor, whose process id and the name to listen on for
the rank follow, or the rank itself. It never imports torch. In the trainer's own process even code
that releases the GIL cost 283 to 873 ms of steps per save; in one of its own, about nothing.

Requests, and what answers them:

    hello    who the rank is and how to save     hello: the snapshot held, the one that is being
                                                 persisted, the slots (with their fd)
    slots    bytes and number of slots wanted    slots: those there are (with their fd), or why not
    persist  a snapshot that is complete         saved: whether and, if not, why not; to the rank
                                                 that said hello last
    give_up  a snapshot that will be overwritten
    protect  (supervisor) ids to keep
    holding  (supervisor) the rank is dead       holding: ids that are being persisted, and the
                                                 snapshot that it has in memory, if it is sealed
    sealed   (supervisor) what it has in memory  sealed: the same, when it is sealed
    finish   (supervisor) which of them to go    idle: when nothing is being persisted
             on with, the others lack a rank
    rest     (supervisor) ranks start: leave them the processors for a while
    work_on  (supervisor) they have started

The supervisor is told, unasked, what became of saves: `said`, with an event for the journal.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from autoglm_resume import events, linux, output
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.snapshot import Snapshot, from_slot
from autoglm_resume.checkpoint.write import in_memory
from autoglm_resume.checkpoint.write.part_writer import GIVEN_UP
from autoglm_resume.journal import stamped
from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.own_path import drop_own_path
from autoglm_resume.protocol.saver_messages import Closed, Message
from autoglm_resume.savers.saver_jobs import SaverJobs


class SaverProcess:
    """Serves one rank after the other, all with the same number; one job at a time."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._links: list[socket.socket] = []
        self._jobs = SaverJobs(self._tell)
        self._held: Message | None = None
        """Where the newest complete snapshot lies."""
        self._sealed: Message | None = None
        """The snapshot held, once it is sealed, as the supervisor wants to hear it."""
        self._rank: socket.socket | None = None
        """That said hello last; its number is the same as of those before it."""
        self._number = 0
        self._supervisor: socket.socket | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="job")
        self._running = 0
        """Jobs, those that wait for their turn included; `_allocating` are those about slots."""
        self._allocating = 0
        self._abandoned: dict[str, threading.Event] = {}
        """Of the saves under way, oldest first: set when one is to be given up. Whoever wants that
        has said so where people read it; nothing is said here of what became of such a save."""
        self._waiting: list[tuple[socket.socket, int]] = []
        """Who wants to know when it is idle, and the number of that question."""
        self._asked: list[tuple[socket.socket, int]] = []
        """Who wants to know what it holds, once that is sealed, and the number of that question."""
        self._news: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What jobs have to say; only the loop answers anybody."""
        self._wake_read, self._wake = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._hear)

    def serve(self, owner: socket.socket, listener: socket.socket | None) -> None:
        """Until the owner is gone and the last job done."""
        self._watch(owner)
        if listener is not None:
            self._supervisor = owner
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        while owner in self._links or self._running or self._abandoned:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():
                    key.data()

    def _accept(self, listener: socket.socket) -> None:
        link, _ = listener.accept()
        _, uid, _ = _credentials(link)
        if uid == os.getuid():
            self._watch(link)
        else:
            link.close()

    def _watch(self, link: socket.socket) -> None:
        self._links.append(link)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._readable(link))

    def _readable(self, link: socket.socket) -> None:
        """Everything that is there: a dead rank's last snapshot counts."""
        try:
            while link in self._links and (found := saver_messages.receive(link, wait=False)):
                self._answer(link, found[0])
        except Closed:
            self._drop(link)

    def _drop(self, link: socket.socket) -> None:
        if link in self._links:
            self._links.remove(link)
            self._selector.unregister(link)
            link.close()

    def _reply(self, link: socket.socket, message: Message, fd: int | None = None) -> None:
        with contextlib.suppress(Closed, OSError):  # the rank may be dead; the journal knows
            saver_messages.send(link, message, fd)

    def _answer(self, link: socket.socket, request: Message) -> None:
        match request["op"]:
            case "hello" if not self._allocating:
                self._hello(link, request)  # rather than when the last rank's snapshot is written
            case "hello":
                self._start(lambda: self._later(lambda: self._hello(link, request)))
            case "slots":
                self._allocating += 1
                self._start(lambda: self._provide(link, request["bytes"], request["count"]))
            case "persist":
                self._persist(link, request)
            case "give_up":
                self._jobs.may_work.set()
                if request["id"] in self._abandoned:
                    self._abandoned[request["id"]].set()
            case "protect":
                self._jobs.protected = frozenset(request["ids"])
            case "holding":
                for other in [other for other in self._links if other is not link]:
                    self._readable(other)
                self._reply(
                    link,
                    {
                        "op": "holding",
                        "question": request["question"],
                        "ids": self._wanted,
                        "sealed": self._sealed,
                        "sealing": self._sealing,
                    },
                )
            case "sealed":
                self._asked.append((link, request["question"]))
                self._say_sealed()
            case "rest":
                self._jobs.may_work.clear()
            case "work_on":
                self._jobs.may_work.set()
            case "finish":
                self._jobs.may_work.set()
                for id, abandoned in self._abandoned.items():
                    if id not in request["ids"]:
                        abandoned.set()
                self._waiting.append((link, request["question"]))
                self._say_idle()

    def _hello(self, link: socket.socket, request: Message) -> None:
        self._rank, self._number = link, request["rank"]
        self._jobs.obey(request)
        follow = self._held is None or self._held["id"] != request["resume"]
        self._start(lambda: self._jobs.begin(request, follow=follow))
        persisting = next(reversed(self._wanted), None)
        self._give_slots(link, {"op": "hello", "held": self._held, "persisting": persisting})

    def _give_slots(self, link: socket.socket, message: Message) -> None:
        slots = self._jobs.slots
        size, count = (slots.size, slots.count) if slots else (0, 0)
        fd = slots.fd if slots else None
        self._reply(link, {**message, "bytes": size, "count": count}, fd)

    def _provide(self, link: socket.socket, size: int, count: int) -> None:
        reason = ""
        try:
            if not self._jobs.fits(size, count):
                self._held = self._sealed = None
                reason = self._jobs.allocate(size, count)
        finally:
            self._later(lambda: self._provided(link, reason))

    def _provided(self, link: socket.socket, reason: str) -> None:
        self._allocating -= 1
        self._give_slots(link, {"op": "slots", "reason": reason})

    def _persist(self, link: socket.socket, request: Message) -> None:
        slots, id = self._jobs.slots, request["id"]
        if slots is None:  # a saver before this one gave them
            reason = "the saver died"
            self._tell(events.PartFailed(id=id, step=step_of(id), reason=reason))
            self._reply(link, {"op": "saved", "id": id, "ok": False, "reason": reason})
            return
        self._held = {key: request[key] for key in ("id", "slot", "at", "length")}
        self._sealed = None
        slot = slots.view(request["slot"])
        text = bytes(slot[request["at"] : request["at"] + request["length"]])
        abandoned = self._abandoned[id] = threading.Event()

        def saved(reason: str) -> None:
            self._later(lambda: self._saved(id, abandoned, reason))

        def job() -> None:
            reason = f"{id}: {GIVEN_UP}"
            try:
                if not abandoned.is_set():
                    reason = f"{id}: the saver failed, its log says why"
                    self._jobs.save(from_slot(text, slot), request, abandoned, self._seal, saved)
            finally:
                self._later(lambda: self._not_saved(id, abandoned, reason))

        # After what there is to read: it may say that this snapshot was given up, and overwritten.
        self._later(lambda: self._start(job))

    def _seal(self, snapshot: Snapshot, names: Sequence[str]) -> None:
        """Ranks may start from the snapshot from now on, unless the next one overwrites it."""
        if self._jobs.several_slots:
            sealed = in_memory.sealed_snapshot(snapshot, names)
            self._later(lambda: self._keep_sealed(sealed))

    @property
    def _wanted(self) -> list[str]:
        """Of the saves under way, oldest first, those that nobody has given up."""
        return [id for id, abandoned in self._abandoned.items() if not abandoned.is_set()]

    @property
    def _sealing(self) -> bool:
        """Whether the snapshot held will be sealed soon."""
        held = self._held["id"] if self._held is not None else None
        return self._sealed is None and held in self._abandoned and self._jobs.several_slots

    def _keep_sealed(self, sealed: Message) -> None:
        if self._held is not None and self._held["id"] == sealed["id"]:
            self._sealed = sealed
        self._say_sealed()

    def _saved(self, id: str, abandoned: threading.Event, reason: str) -> None:
        if self._abandoned.get(id) is not abandoned:
            return  # said before, or tried again meanwhile
        del self._abandoned[id]
        if self._rank is not None:
            message = {"op": "saved", "id": id, "ok": not reason, "reason": reason}
            self._reply(self._rank, message)
        self._say_sealed()

    def _not_saved(self, id: str, abandoned: threading.Event, reason: str) -> None:
        """What is left to say of a save of which nothing was said."""
        if self._abandoned.get(id) is abandoned:
            if not abandoned.is_set():
                self._tell(events.PartFailed(id=id, step=step_of(id), reason=reason))
            self._saved(id, abandoned, reason)

    def _tell(self, event: events.Event, /) -> None:
        """Have the supervisor put an event into the journal."""
        if self._supervisor is not None:
            said = events.to_record(stamped(event, rank=self._number))
            self._reply(self._supervisor, {"op": "said", "event": said})

    def _start(self, work: Callable[[], None]) -> None:
        """Run `work` beside the loop, after what runs already."""

        def job() -> None:
            try:
                work()
            except Exception:  # into the log: a defect must not end the saver
                traceback.print_exc()
            finally:
                self._later(self._job_ended)

        self._running += 1
        self._thread.submit(job)

    def _later(self, news: Callable[[], None]) -> None:
        """Have the loop do this."""
        self._news.put(news)
        os.write(self._wake, b".")

    def _hear(self) -> None:
        os.read(self._wake_read, 1)
        self._news.get()()

    def _job_ended(self) -> None:
        self._running -= 1
        self._say_idle()

    def _say_sealed(self) -> None:
        if self._sealing:
            return
        for link, question in self._asked:
            self._reply(link, {"op": "sealed", "question": question, "sealed": self._sealed})
        self._asked.clear()

    def _say_idle(self) -> None:
        if not self._running and not self._abandoned:
            for link, question in self._waiting:
                self._reply(link, {"op": "idle", "question": question})
            self._waiting.clear()


def _credentials(link: socket.socket) -> tuple[int, int, int]:
    data = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", data)
    return pid, uid, gid


def main(arguments: list[str]) -> None:
    """Run the process; see the module."""
    owner = socket.socket(fileno=int(arguments[0]))
    owner.set_inheritable(False)
    listener: socket.socket | None = None
    drop_own_path()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C in the terminal is the rank's business
    if len(arguments) > 1:
        linux.die_with_parent(int(arguments[1]))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(saver_messages.address(arguments[2]))
        listener.listen()
    linux.stand_back()
    # Jobs that compute must not keep the loop from answering for 5 ms each: ranks wait for it.
    sys.setswitchinterval(0.0005)
    SaverProcess().serve(owner, listener)


if __name__ == "__main__":
    output.begin(noting=True)
    main(sys.argv[1:])
