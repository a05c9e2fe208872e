"""How each system that is compared is started on train_20m.py, and what of it is running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lib import common, peer_setup

RANKS = 2
TIMEOUT = 10.0
"""Seconds for torchrun's users until gloo gives up a collective, the only thing that ends a hang
there. The default is half an hour; below 10 s a rank that saves or loads a little longer than its
peers, or a slow start, would be taken for dead."""
_LIMIT = f"--timeout={TIMEOUT}"
HEARTBEAT = 3.0
"""Seconds for ft_launcher without a heartbeat: five times the longest gap, which is its own factor.
The longest here is a save and the step after it, of 0.5 s together."""

Start = Callable[["Place"], subprocess.Popen[bytes]]


@dataclass(frozen=True)
class Place:
    """Where a run lives, and what it is to do."""

    directory: Path
    python: str
    steps: int
    every: int
    """Steps between checkpoints; 0 leaves that to a system that can find out."""
    heartbeat: float = HEARTBEAT

    @property
    def marks(self) -> Path:
        """What the ranks write down."""
        return self.directory / "marks.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The peers' one checkpoint."""
        return self.directory / "checkpoint.pt"

    @property
    def flushed(self) -> Path:
        """Where lm-resiliency puts what it has in memory."""
        return self.directory / "flushed"

    @property
    def output(self) -> Path:
        """What the command prints."""
        return self.directory / "output"

    def script(self, *more: str, library: str = "torch") -> list[str]:
        """The script, and its arguments."""
        checkpoint = self.checkpoint if library == "torch" else self.flushed
        return [
            *(str(common.SCRIPTS / "train_20m.py"), f"--library={library}"),
            *(f"--marks={self.marks}", f"--steps={self.steps}", f"--every={self.every}"),
            *(f"--checkpoint={checkpoint}", *more),
        ]


def start_torchrun(place: Place) -> subprocess.Popen[bytes]:
    """As its users start it; without the variable torch 2.13 often cannot restart at all."""
    launcher = (place.python, "-m", "torch.distributed.run", "--standalone")
    return _spawn(place, [*launcher, *_restarts(), *place.script(_LIMIT)])


def start_lm_resiliency(place: Place) -> subprocess.Popen[bytes]:
    """Under plain torchrun: its rendezvous backend does not register with torch 2.13."""
    launcher = (place.python, "-m", "torch.distributed.run", "--standalone")
    script = place.script(_LIMIT, library="lm-resiliency")
    return _spawn(place, [*launcher, *_restarts(), *script])


def start_ft_launcher(place: Place) -> subprocess.Popen[bytes]:
    """With what makes it restart fastest: often looking monitors, short times to stop."""
    options = {
        "workload-check-interval": 0.25,
        "initial-rank-heartbeat-timeout": 60,
        "rank-heartbeat-timeout": place.heartbeat,
        "enable-nic-monitor": "false",
        "restart-check-interval": 1,
        "log-level": "WARNING",
    }
    module = "from nvidia_resiliency_ext.fault_tolerance.launcher import main; main()"
    command = [
        *(place.python, "-c", module, "--standalone", "--monitor-interval=0.05"),
        *("--workers-stop-timeout=1", "--ft-restart-policy=any-failed", *_restarts()),
        *(f"--ft-{name}={value}" for name, value in options.items()),
        *place.script("--heartbeats"),
    ]
    return _spawn(place, command)


def start_dlrover(place: Place) -> subprocess.Popen[bytes]:
    """An agent beside a master of its own, which it cannot start by itself with torch 2.13."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    master = [
        *(place.python, "-m", "dlrover.python.master.main", "--platform=local", "--node_num=1"),
        *("--job_name=bench", f"--port={port}"),
    ]
    module = "from dlrover.trainer.torch.main import main; main()"
    agent = [place.python, "-c", module, "--nnodes=1", "--monitor-interval=0.1", *_restarts()]
    both = f"{shlex.join(master)} & exec {shlex.join(agent + place.script(_LIMIT))}"
    return _spawn(place, ["sh", "-c", both], DLROVER_MASTER_ADDR=f"127.0.0.1:{port}")


def start_autoglm(place: Place, **fields: Any) -> subprocess.Popen[bytes]:
    """Ours, with its own checkpoints; `fields` are more of the job."""
    job = common.write_job(
        place.directory,
        script=str(common.SCRIPTS / "train_20m.py"),
        args=["--library=autoglm", f"--marks={place.marks}", f"--steps={place.steps}"],
        nproc_per_node=RANKS,
        checkpoint={"every": {"steps": place.every} if place.every else "auto"},
        **fields,
    )
    return common.spawn([*common.autoglm(place.python), "run", str(job)], place.output)


def start_autoglm_with_spares(place: Place) -> subprocess.Popen[bytes]:
    """Ours, with a warm spare for every rank."""
    return start_autoglm(place, spares=RANKS)


@dataclass(frozen=True)
class System:
    """One of those that are compared."""

    start: Start
    peer: peer_setup.Peer | None = None
    """Whose package it needs."""
    ours: bool = False
    python: str = sys.executable
    version: str = ""


AUTOGLM, SPARES = "autoglm", "autoglm, 2 spares"
TORCHRUN = "torchrun"
OURS = {
    AUTOGLM: System(start_autoglm, ours=True),
    SPARES: System(start_autoglm_with_spares, ours=True),
}
THEIRS = {
    TORCHRUN: System(start_torchrun),
    "ft_launcher": System(start_ft_launcher, peer_setup.NVRX),
    "dlrover-run": System(start_dlrover, peer_setup.DLROVER),
    "lm-resiliency": System(start_lm_resiliency, peer_setup.LM_RESILIENCY),
}


def of_checkout(checkout: Path) -> dict[str, System]:
    """Ours, as another checkout has it, under the name of its directory."""
    python = common.python_of(checkout)
    return {
        name.replace("autoglm", checkout.resolve().name, 1): replace(system, python=python)
        for name, system in OURS.items()
    }


def set_up(systems: Mapping[str, System]) -> tuple[dict[str, System], dict[str, str]]:
    """Those that can be started here, and of the others why not."""
    there, out = {}, {}
    for name, system in systems.items():
        there[name] = system
        if system.peer is not None:
            try:
                found = peer_setup.set_up(system.peer)
            except peer_setup.NotInstalled as error:
                del there[name]
                out[name] = f"{system.peer.package} cannot be installed: {error}"
            else:
                version = f"{system.peer.package} {found.version}"
                there[name] = replace(system, python=found.python, version=version)
    there[TORCHRUN] = replace(there[TORCHRUN], version=f"torch {metadata.version('torch')}")
    return there, out


def print_versions(systems: Mapping[str, System]) -> None:
    """Below a table: of which version the others are."""
    for name, system in systems.items():
        if system.version:
            print(f"  {name}: {system.version}")


def end(process: subprocess.Popen[bytes], pids: Sequence[int] = ()) -> None:
    """Kill a command, everything below it, and the ranks with these `pids`."""
    import psutil

    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _restarts() -> list[str]:
    return ["--max-restarts=100", f"--nproc-per-node={RANKS}"]


def _spawn(place: Place, command: Sequence[str], **more: str) -> subprocess.Popen[bytes]:
    return common.spawn(command, place.output, **more, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
