"""The supervisor's handle on its zygote process."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from autoglm_resume import events
from autoglm_resume.protocol.assignment import Source
from autoglm_resume.supervise.base import spawn
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.core.evidence import signal_name

MESSAGE = 1 << 20
BATCH = 1000
"""Modules in one request, which must fit into the socket's buffer."""
PATIENCE = 5.0
"""Seconds for a fork, which takes milliseconds."""


class ZygoteState(enum.Enum):
    """What a zygote can do now."""

    BUSY = "busy"
    READY = "ready"
    GONE = "gone"


class StoreProcess(NamedTuple):
    """A process that serves a rendezvous store."""

    pid: int
    port: int


class Zygote:
    """One zygote process, which answers one request after the other.

    `tell` hears when it can fork, and when it no longer can; `opened` gets every store that
    was asked for, `spared` every spare with the socket to it; `lost` is called once when it can
    fork no more.
    """

    def __init__(
        self,
        loop: EventLoop,
        environment: Mapping[str, str],
        modules: Sequence[str],
        log: Path,
        tell: events.Tell,
        lost: Callable[[], None],
        opened: Callable[[StoreProcess], None],
        spared: Callable[[int, socket.socket], None],
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._lost = lost
        self._opened = opened
        self._spared = spared
        self._requests: list[dict[str, Any]] = []
        self._asked = ""
        """What it is doing now."""
        self.state = ZygoteState.BUSY
        self.unfit_module: str | None = None
        self._reply: dict[str, Any] | None = None
        self._introduced = False
        self._process, self._socket = spawn.start(
            "autoglm_resume.worker.zygote", [str(os.getpid()), *modules], environment, log
        )
        loop.watch(self._socket, self._readable)

    @property
    def pid(self) -> int:
        """Of the process, also after its end."""
        return self._process.pid

    def preload(self, modules: Sequence[str]) -> None:
        """Import more while the ranks run."""
        for start in range(0, len(modules), BATCH):
            self._ask({"op": "preload", "modules": list(modules[start : start + BATCH])})

    def open_store(self, port: int) -> None:
        """Serve a store at `port`, any free one for 0, in a process of its own."""
        self._ask({"op": "store", "port": port, "supervisor": os.getpid()})

    def spare(self, source: Source, modules: Sequence[str], log: Path, *, split: bool) -> None:
        """Raise a spare; see worker/spare.py."""
        known = {"source": asdict(source), "modules": list(modules), "log": str(log)}
        self._ask({"op": "spare", **known, "split": split, "supervisor": os.getpid()})

    def note(self, ranks: Iterable[int]) -> None:
        """These processes are the ranks now; what they started dies with the supervisor."""
        self._ask({"op": "ranks", "pids": list(ranks)})

    def settle(self) -> None:
        """Have it answer for every child that it was asked for."""
        children = {"spare", "store"}
        self._loop.wait(lambda: self._asked not in children, time.monotonic() + PATIENCE)

    def fork(self, assignment: Path, ranks: Sequence[int]) -> dict[int, int] | None:
        """Pids of freshly forked ranks; None if the zygote is not or no longer able to."""
        if self.state is not ZygoteState.READY:
            return None
        self._reply = None
        self._ask({"op": "fork", "assignment": str(assignment), "ranks": list(ranks)})
        if not self._loop.wait(
            lambda: self.state is not ZygoteState.BUSY, time.monotonic() + PATIENCE
        ):
            self.give_up(f"it did not fork within {PATIENCE:.0f} s")
            return None
        if self._reply is None or self._reply["op"] != "forked":
            return None
        return {int(rank): pid for rank, pid in self._reply["pids"].items()}

    def close(self) -> None:
        """End the process."""
        if self.state is not ZygoteState.GONE:
            self._end()

    def _ask(self, request: dict[str, Any]) -> None:
        self._requests.append(request)
        self._send_next()

    def _send_next(self) -> None:
        if self.state is not ZygoteState.READY or not self._requests:
            return
        self.state = ZygoteState.BUSY
        request = self._requests.pop(0)
        self._asked = request["op"]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(json.dumps(request).encode())

    def _readable(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self._socket, MESSAGE, 1)
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            # The socket closes a moment before the process has an exit code.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            self.give_up(_ending(self._process.returncode))
            return
        reply = json.loads(message)
        if reply["op"] == "unfit":
            self.unfit_module = reply["module"]
            after = f" after importing {reply['module']}" if reply["module"] else ""
            self.give_up(f"it cannot fork safely: {reply['reason']}{after}")
            return
        self._reply = reply
        self.state, self._asked = ZygoteState.READY, ""
        self._send_next()
        if reply["op"] == "store" and reply["port"]:
            self._opened(StoreProcess(reply["pid"], reply["port"]))
        if reply["op"] == "spare" and fds:
            self._spared(reply["pid"], socket.socket(fileno=fds[0]))
        if reply["op"] == "ready" and not self._introduced:
            self._introduced = True
            self._tell(
                events.ZygoteReady(
                    pid=self.pid,
                    seconds=reply["seconds"],
                    modules=reply["modules"],
                    skipped=tuple(reply["skipped"]),
                )
            )

    def give_up(self, reason: str) -> None:
        """End it, and say why."""
        self._end()
        self._tell(events.ZygoteLost(reason=reason, module=self.unfit_module or ""))
        self._lost()

    def _end(self) -> None:
        self.state, self._asked = ZygoteState.GONE, ""
        # In this order: one that sees the socket close takes the supervisor for dead, and ends what
        # the ranks have started, and them.
        self._process.kill()
        self._process.wait()
        self._loop.forget(self._socket)
        self._socket.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it died by {signal_name(-code)}"
    return f"it ended with exit code {code}"
