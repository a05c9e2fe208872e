"""A saver process of a test's own, and the links to it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.format.snapshot import Snapshot, describe, layout
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.protocol import saver_messages
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.protocol.saver_messages import Closed, Message
from autoglm_resume.protocol.shared_memory import Slots
from tests.patience import PATIENCE

SIZE = 1 << 20


class Link:
    """A connection to a saver."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self.slots: Slots | None = None
        self.said: list[Any] = []
        """Events."""

    def send(self, **message: Any) -> None:
        saver_messages.send(self.socket, message)

    def receive(self) -> Message:
        while True:
            found = saver_messages.receive(self.socket, wait=True)
            assert found is not None
            message, fd = found
            if message["op"] != "said":
                break
            self.said.append(message["event"])
        if fd is not None:
            self.slots = Slots(fd, message["bytes"], message["count"])
        return message

    def ask(self, **message: Any) -> Message:
        self.send(**message)
        return self.receive()

    def holding(self) -> list[str]:
        """As the supervisor asks it."""
        answer = self.ask(op="holding", question=1)
        assert (answer["op"], answer["question"]) == ("holding", 1)
        ids: list[str] = answer["ids"]
        return ids

    def finish(self, *ids: str) -> None:
        assert self.ask(op="finish", ids=ids, question=2) == {"op": "idle", "question": 2}

    def sealed(self) -> Message | None:
        answer = self.ask(op="sealed", question=3)
        assert (answer["op"], answer["question"]) == ("sealed", 3)
        sealed: Message | None = answer["sealed"]
        return sealed

    def events(self, kind: str) -> list[Any]:
        """What the saver has said so far, to its supervisor."""
        self.socket.settimeout(0)
        with contextlib.suppress(Closed):
            while found := saver_messages.receive(self.socket, wait=False):
                assert found[0]["op"] == "said"
                self.said.append(found[0]["event"])
        self.socket.settimeout(PATIENCE)
        return [event for event in self.said if event["event"] == kind]

    def put(self, snapshot: Snapshot, slot: int) -> None:
        """Into a slot, and hand it over."""
        assert self.slots is not None
        view = self.slots.view(slot)
        offsets, at = layout(len(tensor.data) for tensor in snapshot.tensors)
        for offset, tensor in zip(offsets, snapshot.tensors, strict=True):
            view[offset : offset + len(tensor.data)] = tensor.data
        text = describe(snapshot)
        view[at : at + len(text)] = text
        self.send(
            op="persist",
            id=snapshot.id,
            slot=slot,
            at=at,
            length=len(text),
            began=0.0,
            blocked=0.0,
        )


class SaverHome:
    """Where a saver saves, and its process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store(directory / "ckpt")
        self.log = directory / "saver.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.name = f"autoglm-test-{os.getpid()}-{directory.name}"

    def start(self, *, listening: bool = False) -> tuple[Link, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        more = [str(os.getpid()), self.name] if listening else []
        with theirs, self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "autoglm_resume.savers.saver_process"),
                    *(str(theirs.fileno()), *more),
                ],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return Link(ours), process

    def connect(self) -> Link:
        """As a rank does it."""
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                link.connect(saver_messages.address(self.name))
            except ConnectionRefusedError:
                link.close()
                assert psutil.Process(self.processes[-1].pid).status() != "zombie"
            else:
                return Link(link)

    def hello(
        self, link: Link, world_size: int = 1, resume: str | None = None, **how: Any
    ) -> Message:
        checkpoint = Checkpointing(str(self.store.root), **how)
        return link.ask(
            op="hello",
            rank=0,
            world_size=world_size,
            checkpoint=asdict(checkpoint),
            resume=resume,
        )

    def held(self, step: int) -> dict[str, torch.Tensor]:
        return restore.read(self.store, self.store.directory(id_of(step)), 0).states["m"]


def in_a_child(work: Callable[[], object]) -> int:
    """Exit code of a process that does `work`: 1 if it raises, minus the signal it died by."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def id_of(step: int) -> str:
    return checkpoint_id(step, "a0")


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), float(step)), "n": torch.arange(step)}


def taken(step: int, world_size: int = 1, **identity: Any) -> Snapshot:
    return capture.take(
        {"m": state(step)}, id=id_of(step), rank=0, world_size=world_size, **identity
    )


def equal(found: dict[str, torch.Tensor], step: int) -> bool:
    return all(torch.equal(found[name], value) for name, value in state(step).items())
