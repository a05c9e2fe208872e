"""The saver: a process of low priority that persists one rank's snapshots and outlives the rank.

    python -m autoglm_resume.worker.saver_process FD [PARENT NAME]

FD is a socket to whoever started it: the supervisor, whose process id and the name to listen on for
the rank follow, or the rank itself. It never imports torch. In the trainer's own process even code
that releases the GIL cost 283 to 873 ms of steps per save; in one of its own, about nothing.

Requests, and what answers them:

    hello    who the rank is and how to save     hello: the snapshot held, the slots (with their fd)
    slots    bytes and number of slots wanted    slots: those there are (with their fd), or why not
    persist  a snapshot that is complete         saved: whether and, if not, why not
    protect  (supervisor) ids to keep
    holding  (supervisor) the rank is dead       holding: ids that are being persisted
    finish   (supervisor) which of them to go    idle: when nothing is being persisted
             on with, the others lack a rank
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autoglm_resume import linux
from autoglm_resume.checkpoint.manifest import MANIFEST
from autoglm_resume.checkpoint.previous import Previous
from autoglm_resume.checkpoint.saver import SaveFailed, Saver
from autoglm_resume.checkpoint.snapshot import Snapshot, from_slot
from autoglm_resume.checkpoint.store import Store
from autoglm_resume.errors import CheckpointError
from autoglm_resume.worker import housekeeping, saver_link, turns
from autoglm_resume.worker.contract import Checkpointing
from autoglm_resume.worker.events import Events
from autoglm_resume.worker.rank import drop_own_path
from autoglm_resume.worker.saver_link import Closed, Message
from autoglm_resume.worker.slots import Slots, room

MARGIN = 0.9
"""Of the memory that is free, what slots may take."""


class SaverProcess:
    """Serves one rank after the other, all with the same number; one job at a time."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._links: list[socket.socket] = []
        self._slots: Slots | None = None
        self._saver: Saver | None = None
        self._held: Message | None = None
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="job")
        self._running: list[str | None] = []
        """What is being done, oldest first: ids of checkpoints, None for anything else."""
        self._abandoned: dict[str, threading.Event] = {}
        """Of the saves under way: set when one is to be given up."""
        self._protected: frozenset[str] = frozenset()
        self._waiting: list[tuple[socket.socket, int]] = []
        """Who wants to know when it is idle, and the number of that question."""
        self._done_read, self._done_write = os.pipe()
        self._selector.register(self._done_read, selectors.EVENT_READ, self._job_ended)

    def serve(self, owner: socket.socket, listener: socket.socket | None) -> None:
        """Until the owner is gone and the last job done."""
        self._watch(owner)
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        while owner in self._links or self._running:
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
            while link in self._links and (found := saver_link.receive(link, wait=False)):
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
            saver_link.send(link, message, fd)

    def _answer(self, link: socket.socket, request: Message) -> None:
        match request["op"]:
            case "hello":
                self._start(lambda: self._hello(link, request), None)
            case "slots":
                size, count = request["bytes"], request["count"]
                self._start(lambda: self._provide(link, size, count), None)
            case "persist":
                self._persist(link, request)
            case "protect":
                self._protected = frozenset(request["ids"])
            case "holding":
                for other in [other for other in self._links if other is not link]:
                    self._readable(other)
                ids = [id for id in self._running if id]
                answer = {"op": "holding", "question": request["question"], "ids": ids}
                self._reply(link, answer)
            case "finish":
                for id, abandoned in self._abandoned.items():
                    if id not in request["ids"]:
                        abandoned.set()
                self._waiting.append((link, request["question"]))
                self._say_idle()

    def _hello(self, link: socket.socket, request: Message) -> None:
        self._request = request
        how = Checkpointing.from_json(request["checkpoint"])
        store = Store(Path(how.dir))
        if self._saver is None or self._saver.store.root != store.root:
            self._saver = Saver(store)
        self._saver.options = how.options
        self._how = how
        self._events = Events(
            Path(request["events"]) if request["events"] else None, request["rank"]
        )
        resumed = request["resume"]
        if self._held is None or self._held["id"] != resumed:
            self._saver.follow(_previous(store, resumed, request["rank"], request["world_size"]))
        slots = self._slots
        self._reply(
            link,
            {
                "op": "hello",
                "held": self._held,
                "bytes": slots.size if slots else 0,
                "count": slots.count if slots else 0,
            },
            slots.fd if slots else None,
        )

    def _provide(self, link: socket.socket, size: int, count: int) -> None:
        slots = self._slots
        if slots is not None and slots.size >= size and slots.count == count:
            message = {"op": "slots", "bytes": slots.size, "count": slots.count}
            self._reply(link, message, slots.fd)
            return
        self._allocate(link, size, count)

    def _allocate(self, link: socket.socket, size: int, count: int) -> None:
        self._held = None
        if self._slots is not None:
            if self._saver is not None:
                self._saver.forget_memory()
            self._slots.close()
            self._slots = None
        # One after the other, or all savers of a machine would count on the same memory. They
        # share a log, which is as good a thing to lock as any.
        with _locked(sys.stdout.fileno()):
            self._slots, reason = _new_slots(size, count)
        slots = self._slots
        self._reply(
            link,
            {
                "op": "slots",
                "bytes": slots.size if slots else 0,
                "count": slots.count if slots else 0,
                "reason": reason,
            },
            slots.fd if slots else None,
        )

    def _persist(self, link: socket.socket, request: Message) -> None:
        slots = self._slots
        if slots is None:  # a saver before this one gave them
            lost = {"op": "saved", "id": request["id"], "ok": False, "reason": "the saver died"}
            self._reply(link, lost)
            return
        self._held = {key: request[key] for key in ("id", "slot", "at", "length")}
        slot = slots.view(request["slot"])
        text = bytes(slot[request["at"] : request["at"] + request["length"]])
        self._abandoned[request["id"]] = threading.Event()
        self._start(lambda: self._save(link, from_slot(text, slot), request), request["id"])

    def _save(self, link: socket.socket, snapshot: Snapshot, request: Message) -> None:
        assert self._saver is not None
        with turns.persisting(self._saver.store.root):
            self._save_and_tidy(self._saver, link, snapshot, request)

    def _save_and_tidy(
        self, saver: Saver, link: socket.socket, snapshot: Snapshot, request: Message
    ) -> None:
        slots = self._slots
        reason = ""
        try:
            saved = saver.persist(snapshot, self._abandoned[snapshot.id])
        except SaveFailed as error:
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        else:
            if slots is not None and slots.count == 1:
                saver.forget_memory()  # the next snapshot overwrites it
            housekeeping.announce(
                self._events, saved, began=request["began"], blocked=request["blocked"]
            )
        if reason:
            self._events.emit("save_failed", id=snapshot.id, step=snapshot.step, reason=reason)
        self._reply(link, {"op": "saved", "id": snapshot.id, "ok": not reason, "reason": reason})
        with contextlib.suppress(OSError, CheckpointError):
            resumed: str | None = self._request["resume"]
            stay = self._protected | ({resumed} if resumed else frozenset())
            housekeeping.tidy(saver.store, self._how, snapshot, stay, self._events)

    def _start(self, work: Callable[[], None], id: str | None) -> None:
        """Run `work` beside the loop, after what runs already."""

        def job() -> None:
            try:
                work()
            except Exception:  # into the log: a defect must not end the saver
                traceback.print_exc()
            finally:
                os.write(self._done_write, b".")

        self._running.append(id)
        self._jobs.submit(job)

    def _job_ended(self) -> None:
        os.read(self._done_read, 1)
        self._abandoned.pop(self._running.pop(0) or "", None)
        self._say_idle()

    def _say_idle(self) -> None:
        if not self._running:
            for link, question in self._waiting:
                self._reply(link, {"op": "idle", "question": question})
            self._waiting.clear()


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    with contextlib.suppress(OSError):  # a terminal or a pipe has no lock
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def _new_slots(size: int, count: int) -> tuple[Slots | None, str]:
    """As many as there is room for, and why not all."""
    free = int(room() * MARGIN)
    fitting = min(count, free // max(size, 1))
    reason = ""
    if fitting < count:
        reason = (
            f"{count} slots of {size:,} bytes were asked for, there is room for {fitting}:"
            f" {free:,} bytes"
        )
    if not fitting:
        return None, reason
    try:
        return Slots.create(size, fitting), reason
    except OSError as error:
        return None, f"{fitting} slots of {size:,} bytes: {error.strerror}"


def _previous(store: Store, id: str | None, rank: int, world_size: int) -> Previous | None:
    """What the next part may refer to after a restart; its tensors are in memory no more."""
    if id is None:
        return None
    with contextlib.suppress(CheckpointError, OSError):
        path = store.directory(id)
        if (path / MANIFEST).exists() and store.load_manifest(path).world_size == world_size:
            return Previous(store.load_part(path, rank))
    return None


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
        listener.bind(saver_link.address(arguments[2]))
        listener.listen()
    linux.stand_back()
    SaverProcess().serve(owner, listener)


if __name__ == "__main__":
    main(sys.argv[1:])
