"""The zygote: imports torch and what the script needs once, and forks ranks on request.

It stays single-threaded and never touches CUDA, because neither survives a fork; it checks both
before every fork and refuses if it must. A forked rank is orphaned on purpose: the kernel gives it
to the supervisor, which reaps its true exit code, and both survive the zygote's death.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from autoglm_resume import linux, output
from autoglm_resume.protocol.assignment import ALWAYS, Assignment, Source
from autoglm_resume.protocol.own_path import drop_own_path
from autoglm_resume.worker import ahead, environment_reads
from autoglm_resume.worker import rank as rank_process
from autoglm_resume.worker.spare import Spare

MESSAGE = 1 << 20
BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


class ForkedRank(NamedTuple):
    """In a forked child: become a rank."""

    assignment: Assignment
    rank: int

    def be(self) -> int:
        """The whole life of the rank; returns its exit code."""
        rank_process.settle(self.assignment, self.rank, self.assignment.rank_environment(self.rank))
        return rank_process.run(self.assignment, self.rank)


class StoreServer(NamedTuple):
    """In a forked child: become a process that serves a rendezvous store."""

    port: int
    tell_port: int
    """Pipe for the port that it got."""

    def be(self) -> int:
        """Serve until killed."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        os.setsid()
        store = TCPStore("localhost", self.port, is_master=True, wait_for_workers=False)
        os.write(self.tell_port, store.port.to_bytes(2, "little"))
        os.close(self.tell_port)
        while True:
            signal.pause()


class SpareRank(NamedTuple):
    """In a forked child: become a spare."""

    link: int
    """Descriptor of its end of a socket to the supervisor."""
    source: Source
    modules: Sequence[str]
    log: Path
    split: bool

    def be(self) -> int:
        """The whole life of the spare, and of the rank it becomes."""
        link = socket.socket(fileno=self.link)
        return Spare(link, self.source).live(self.modules, self.log, split=self.split)


Role: TypeAlias = "ForkedRank | StoreServer | SpareRank"


def threads() -> int:
    """Threads of this process, those of C libraries included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def unfit() -> str:
    """Why a fork of this process would not work; empty if it would."""
    if threads() > 1:
        _announce_fork()
    if threads() > 1:
        return f"it has grown to {threads()} threads"
    with contextlib.suppress(OSError):
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(fd.readlink()).startswith("/dev/nvidia"):
                    return "CUDA is initialised in it"
    return ""


def _announce_fork() -> None:
    """Let libraries that know about forks end their threads, by a fork that comes to nothing.

    OpenBLAS starts its threads when NumPy is imported, ends them before a fork, and starts them
    again in whoever computes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def preload(modules: list[str]) -> dict[str, Any]:
    """Import `modules` in order; stops at the first that makes a fork unsafe, and names it."""
    began = time.monotonic()
    skipped = []
    # Some modules count devices when they are imported; NVML does that without initialising CUDA.
    by_nvml = BY_NVML not in os.environ
    if by_nvml:
        os.environ[BY_NVML] = "1"
    # A quarter of the time that torch takes goes to looking for garbage, of which there are 7 MB.
    gc.disable()
    try:
        for name in modules:
            with ahead.importing(name):
                try:
                    importlib.import_module(name)
                except Exception as error:
                    skipped.append(f"{name}: {type(error).__name__}: {error}")
            # A module that keeps what it found there would be wrong in every rank.
            asked = environment_reads.read_of_rank()
            reason = f"it asks for {asked} when it is imported" if asked else unfit()
            if reason:
                return {"op": "unfit", "module": name, "reason": reason}
    finally:
        if by_nvml:  # the ranks find the environment that the job has
            del os.environ[BY_NVML]
        gc.freeze()  # a rank that looked for garbage among all this would copy its pages
        gc.enable()
    return {
        "op": "ready",
        "seconds": time.monotonic() - began,
        "modules": len(sys.modules),
        "skipped": skipped,
    }


def serve(control: socket.socket) -> Role | None:
    """Answer requests until the supervisor is gone; in a forked child, return what to become."""
    ranks: list[int] = []
    while True:
        message = control.recv(MESSAGE)
        if not message:
            _end(ranks)
            return None
        request = json.loads(message)
        reply: dict[str, Any]
        if request["op"] == "preload":
            reply = preload(request["modules"])
        elif request["op"] == "ranks":
            ranks = request["pids"]
            reply = {"op": "noted"}
        elif reason := unfit():
            reply = {"op": "unfit", "module": None, "reason": reason}
        elif request["op"] == "store":
            told, tell = os.pipe()
            role, pids = _fork(request["supervisor"], [StoreServer(request["port"], tell)])
            os.close(told if role else tell)
            if role:
                control.close()
                return role
            # Nothing comes when the port was taken: the process has ended then.
            port = int.from_bytes(os.read(told, 2), "little")
            os.close(told)
            reply = {"op": "store", "pid": pids[0], "port": port}
        elif request["op"] == "spare":
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            source = Source.from_json(request["source"])
            modules, log = request["modules"], Path(request["log"])
            made = SpareRank(theirs.fileno(), source, modules, log, request["split"])
            role, pids = _fork(request["supervisor"], [made])
            if role:
                ours.close()
                theirs.detach()
                control.close()
                return role
            theirs.close()
            with contextlib.suppress(BrokenPipeError):
                reply = {"op": "spare", "pid": pids[0]}
                socket.send_fds(control, [json.dumps(reply).encode()], [ours.fileno()])
            ours.close()
            continue
        else:
            assignment = Assignment.load(Path(request["assignment"]))
            wanted = [ForkedRank(assignment, rank) for rank in request["ranks"]]
            role, pids = _fork(assignment.supervisor, wanted)
            if role:
                control.close()
                return role
            ranks = pids  # until the supervisor tells of those that it took from spares, too
            reply = {"op": "forked", "pids": dict(zip(request["ranks"], pids, strict=True))}
        with contextlib.suppress(BrokenPipeError):
            control.send(json.dumps(reply).encode())


def _end(ranks: list[int]) -> None:
    """The supervisor is dead, so the ranks are; end what they started, such as loader workers."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _fork(supervisor: int, roles: Sequence[Role]) -> tuple[Role | None, list[int]]:
    """Fork a child of `supervisor` per role: the role in each of them, here all their pids.

    A process in between forks them and ends, which makes them orphans.
    """
    told, tell = os.pipe()
    adopted, adopt = os.pipe()
    between = os.fork()
    if between == 0:
        for role in roles:
            child = os.fork()
            if child == 0:
                for fd in (told, tell, adopt):
                    os.close(fd)
                # The parent-death signal belongs to the parent at the time of the call, so wait
                # until the process between us is reaped and the supervisor is the parent.
                os.read(adopted, 1)
                os.close(adopted)
                linux.die_with_parent(supervisor)
                return role, []
            os.write(tell, child.to_bytes(8, "little"))
        os._exit(0)
    os.close(tell)
    os.close(adopted)
    try:
        os.waitpid(between, 0)
        data = os.read(told, 8 * len(roles))
    finally:
        os.close(told)
        os.close(adopt)
    return None, [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def main() -> None:
    """`python -m autoglm_resume.worker.zygote FD SUPERVISOR MODULE…`"""
    output.begin(noting=True)  # in the ranks, too: a full disk costs lines of their logs
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    supervisor = int(sys.argv[2])
    modules = sys.argv[3:]
    linux.die_with_parent(supervisor, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    drop_own_path()
    with contextlib.suppress(OSError):
        control.send(json.dumps(preload([*ALWAYS, *modules])).encode())
    linux.outlive_parent()  # from here on a closed socket says it
    role = serve(control)
    if role is not None:
        sys.exit(role.be())


if __name__ == "__main__":
    main()
