"""The supervisor's savers: one process per rank, which outlives every attempt."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import step_of
from autoglm_resume.checkpoint.format.part import part_file
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.in_memory import Sealed
from autoglm_resume.events import Event
from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.saver_messages import Closed, Message
from autoglm_resume.supervise.base import spawn
from autoglm_resume.supervise.base.event_loop import EventLoop

DEATHS = 100
"""After which savers are not replaced any more: something is wrong here, and ranks save without."""
PATIENCE = 5.0
"""Seconds for a saver to answer what takes it no time."""


class Savers:
    """Savers of ranks 0 to `count` - 1; one that dies is replaced, and what it held is lost."""

    def __init__(
        self,
        loop: EventLoop,
        environment: Mapping[str, str],
        name: str,
        count: int,
        log: Path,
        tell: events.Tell,
        hear: Callable[[int, Event], None],
    ) -> None:
        """`tell` gets what happens to them, `hear` what they say of the saves of a rank."""
        self._loop = loop
        self._environment = environment
        self._log = log
        self._tell = tell
        self._hear = hear
        self.names = tuple(f"autoglm-{name}-{os.getpid()}-{rank}" for rank in range(count))
        """Where ranks find theirs."""
        self._ranks = range(count)
        self._deaths = 0
        self._protected: frozenset[str] = frozenset()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[socket.socket] = []
        self._replies: dict[int, Message] = {}
        self._questions = 0
        for rank in self._ranks:
            process, link = self._spawn(rank)
            self._processes.append(process)
            self._links.append(link)

    @property
    def pids(self) -> frozenset[int]:
        """Of the processes."""
        return frozenset(process.pid for process in self._processes)

    def settle(
        self,
        store: Store,
        timeout: float,
        hurried: Callable[[], bool],
        from_memory: Callable[[str], bool] = lambda id: False,
    ) -> Sealed | None:
        """The ranks are dead: see to it that what they left in memory is not lost.

        Returns the newest checkpoint that is `from_memory`, by its id, if all savers have it there;
        they write on when told to `work_on`. Else returns when what they have is on storage, or, at
        once, when `hurried` turns true. Snapshots that one of the ranks has not completed are given
        up.
        """
        began = time.monotonic()
        holding = self._ask({"op": "holding"}, began + PATIENCE, hurried)
        under_way = {id for reply in holding.values() for id in reply["ids"]}
        missing = {id: self._missing(store, id, holding) for id in sorted(under_way)}
        whole = [id for id, ranks in missing.items() if not ranks]
        self._send({"op": "finish", "ids": whole}, holding)
        for id, ranks in missing.items():
            if ranks:
                # The end that a save under way is to have when ranks die; a failed one is not.
                self._tell(events.SaveCutOff(id=id, step=step_of(id), missing=tuple(ranks)))
        if len(holding) == len(self._ranks):
            snapshots = holding
            if any(reply["sealing"] for reply in holding.values()):
                snapshots = self._ask({"op": "sealed"}, began + timeout, hurried)
            sealed = Sealed.of([snapshots.get(rank, {}).get("sealed") for rank in self._ranks])
            if sealed is not None and from_memory(sealed.id):
                # With as many ranks as processors, savers cost a restart up to half of its time.
                self._send({"op": "rest"})
                return sealed
        # One that does not even answer hangs, and is not waited for.
        self._ask({"op": "finish", "ids": whole}, began + timeout, hurried, holding)
        return None

    def work_on(self) -> None:
        """The ranks that were started after `settle` train."""
        self._send({"op": "work_on"})

    def _missing(self, store: Store, id: str, holding: Mapping[int, Message]) -> list[int]:
        """The ranks without which checkpoint `id` stays incomplete."""
        return [
            rank
            for rank in self._ranks
            if not (rank in holding and id in holding[rank]["ids"])
            and not (store.directory(id) / part_file(rank)).exists()
        ]

    def protect(self, ids: frozenset[str]) -> None:
        """Retention must keep these from now on."""
        self._protected = ids
        for link in self._links:
            self._tell_protected(link)

    def _tell_protected(self, link: socket.socket) -> None:
        # A saver that is stuck must not hold up the supervisor; it deletes nothing either.
        with contextlib.suppress(Closed, OSError):
            message = {"op": "protect", "ids": sorted(self._protected)}
            saver_messages.send(link, message, wait=False)

    def close(self) -> None:
        """End them."""
        for process, link in zip(self._processes, self._links, strict=True):
            self._loop.forget(link)
            link.close()
            process.kill()
        until = time.monotonic() + PATIENCE
        for process in self._processes:
            # One that waits for a mount that is dead does not even hear this.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))

    def _ask(
        self,
        message: Message,
        until: float,
        hurried: Callable[[], bool],
        ranks: Collection[int] | None = None,
    ) -> dict[int, Message]:
        """Their answers, as far as they come in time; of all of them, or of those of `ranks`."""
        asked = self._send(message, ranks)

        def answered() -> bool:
            # One that dies meanwhile has a successor that was not asked.
            waiting = [
                rank
                for rank, process in enumerate(self._processes)
                if process.pid in asked and rank not in self._replies
            ]
            return not waiting or hurried()

        self._loop.wait(answered, until)
        return self._replies

    def _send(self, message: Message, ranks: Collection[int] | None = None) -> set[int]:
        """Ask them something new; returns the process ids of those that will answer."""
        self._replies = {}
        self._questions += 1
        asked = set()
        for rank in self._ranks if ranks is None else ranks:
            link = self._links[rank]
            with contextlib.suppress(Closed, OSError):
                saver_messages.send(link, {**message, "question": self._questions}, wait=False)
                asked.add(self._processes[rank].pid)
        return asked

    def _readable(self, rank: int, link: socket.socket) -> None:
        try:
            while found := saver_messages.receive(link, wait=False):
                message = found[0]
                if message["op"] == "said":
                    self._hear(rank, events.read(message["event"]))
                # The answer to an earlier question may come late.
                elif message["question"] == self._questions:
                    self._replies[rank] = message
        except Closed:
            self._loop.forget(link)
            link.close()
            process = self._processes[rank]
            process.wait()
            self._tell(events.SaverLost(rank=rank, pid=process.pid, code=process.returncode))
            self._deaths += 1
            if self._deaths <= DEATHS:
                self._processes[rank], self._links[rank] = self._spawn(rank)

    def _spawn(self, rank: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
        process, ours = spawn.start(
            "autoglm_resume.savers.saver_process",
            [str(os.getpid()), self.names[rank]],
            self._environment,
            self._log,
        )
        self._loop.watch(ours, lambda: self._readable(rank, ours))
        self._tell_protected(ours)
        return process, ours
