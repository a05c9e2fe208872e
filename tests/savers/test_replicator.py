from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.savers.replicator import MESSAGE
from tests.patience import PATIENCE


class Process:
    """The process as its supervisor sees it."""

    def __init__(self, root: Path, *targets: str) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "autoglm_resume.savers.replicator"),
                    *(str(theirs.fileno()), str(os.getpid()), str(root), "run", *targets),
                ],
                pass_fds=[theirs.fileno()],
            )

    def ask(self, **request: Any) -> None:
        self.socket.send(json.dumps(request).encode())

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self.socket.recv(MESSAGE)))

    def round(self) -> dict[str, Any]:
        """The end of the next look at a replica."""
        while (said := self.hear())["op"] != "round":
            pass
        return said


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "replica").mkdir()
    return str(tmp_path / "replica")


@pytest.fixture
def started(tmp_path: Path, target: str) -> Iterator[Process]:
    running = Process(tmp_path / "checkpoints", target)
    yield running
    running.socket.close()
    assert running.process.wait(PATIENCE) == 0, "a closed socket is the end"


def test_it_looks_by_itself_and_then_whenever_it_is_told(started: Process, target: str) -> None:
    assert started.hear() == {"op": "listed", "replica": target, "ids": [], "waiting": 0}
    assert started.hear() == {"op": "round", "replica": target, "number": 0, "failure": ""}
    started.ask(op="replicate", number=7)
    assert started.round()["number"] == 7


def test_it_leaves_the_processors_to_others_and_never_loads_torch(started: Process) -> None:
    started.round()
    pid = started.process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_flush_ends_the_wait_for_a_retry(tmp_path: Path) -> None:
    running = Process(tmp_path / "checkpoints", str(tmp_path / "missing"))
    assert "mount" in running.round()["failure"]
    for number in range(1, 8):  # waits would double each time
        running.ask(op="flush", number=number)
        while running.round()["number"] < number:
            pass
    running.socket.close()
    assert running.process.wait(PATIENCE) == 0


def test_a_repair_of_nothing_says_so(started: Process) -> None:
    started.round()
    started.ask(op="repair", id="step-0000000010.a0", digest=None)
    while (said := started.hear())["op"] != "repaired":
        pass
    assert said["files"] == []
    assert "no replica has a good copy" in said["reason"]
