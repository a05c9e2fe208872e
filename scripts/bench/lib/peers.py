"""How each system that is compared is started on train_20m.py, and what of it is running."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import common

RANKS = 2
TIMEOUT = 10.0
"""Seconds for torchrun's users until gloo gives up a collective, the only thing that ends a hang
there. The default is half an hour; below 10 s a rank that saves or loads a little longer than its
peers, or a slow start, would be taken for dead."""
_LIMIT = f"--timeout={TIMEOUT}"
HEARTBEAT = 3.0
"""Seconds for ft_launcher without a heartbeat: five times the longest gap, which is its own factor.
The longest here is a save and the step after it, of 0.5 s together."""
PACKAGES = (
    "nvidia-resiliency-ext==0.4.1 defusedxml dlrover==0.6.1 deprecated wrapt requests idna urllib3 "
    "charset-normalizer certifi grpcio protobuf kubernetes six python-dateutil websocket-client "
    "google-auth requests-oauthlib oauthlib durationpy cachetools rsa pyasn1 pyasn1-modules"
)
"""Of the peers, to be installed with `--no-deps --target DIR`; torch and pynvml are there."""

Start = Callable[["Place"], subprocess.Popen[bytes]]


@dataclass(frozen=True)
class Place:
    """Where a run lives, and what it is to do."""

    directory: Path
    peers: Path | None
    steps: int
    every: int
    """Steps between checkpoints."""
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
    def output(self) -> Path:
        """What the command prints."""
        return self.directory / "output"

    def script(self, *more: str) -> list[str]:
        """The script with torch.save, and its arguments."""
        return [
            *(str(common.SCRIPTS / "train_20m.py"), "--library=torch", f"--marks={self.marks}"),
            *(f"--steps={self.steps}", f"--every={self.every}", f"--checkpoint={self.checkpoint}"),
            *more,
        ]


def start_torchrun(place: Place) -> subprocess.Popen[bytes]:
    """As its users start it; without the variable torch 2.13 often cannot restart at all."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return _spawn(place, [*launcher, *_restarts(), *place.script(_LIMIT)])


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
        *(sys.executable, "-c", module, "--standalone", "--monitor-interval=0.05"),
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
        *(sys.executable, "-m", "dlrover.python.master.main", "--platform=local", "--node_num=1"),
        *("--job_name=bench", f"--port={port}"),
    ]
    module = "from dlrover.trainer.torch.main import main; main()"
    agent = [sys.executable, "-c", module, "--nnodes=1", "--monitor-interval=0.1", *_restarts()]
    both = f"{shlex.join(master)} & exec {shlex.join(agent + place.script(_LIMIT))}"
    return _spawn(place, ["sh", "-c", both], DLROVER_MASTER_ADDR=f"127.0.0.1:{port}")


def start_autoglm(place: Place, **fields: Any) -> subprocess.Popen[bytes]:
    """Ours, with its own checkpoints; `fields` are more of the job."""
    job = common.write_job(
        place.directory,
        script=str(common.SCRIPTS / "train_20m.py"),
        args=["--library=autoglm", f"--marks={place.marks}", f"--steps={place.steps}"],
        nproc_per_node=RANKS,
        checkpoint={"every": {"steps": place.every}},
        **fields,
    )
    return common.spawn([*common.autoglm(), "run", str(job)], place.output)


def start_autoglm_with_spares(place: Place) -> subprocess.Popen[bytes]:
    """Ours, with a warm spare for every rank."""
    return start_autoglm(place, spares=RANKS)


AUTOGLM, SPARES = "autoglm", "autoglm, 2 spares"
OURS: dict[str, Start] = {AUTOGLM: start_autoglm, SPARES: start_autoglm_with_spares}
THEIRS: dict[str, Start] = {
    "torchrun": start_torchrun,
    "ft_launcher": start_ft_launcher,
    "dlrover-run": start_dlrover,
}
MODULES = {"ft_launcher": "nvidia_resiliency_ext", "dlrover-run": "dlrover"}


def missing(name: str, peers: Path | None) -> str:
    """Why a system cannot be started here; empty if it can."""
    module = MODULES.get(name)
    if module is None or importlib.util.find_spec(module):
        return ""
    if peers is not None and (peers / module).is_dir():
        return ""
    where = f"in {peers}" if peers else "and no --peers DIR given"
    return f"no package {module} {where}: pip install --no-deps --target DIR {PACKAGES}"


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
    variables = {**more, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if place.peers is not None:
        paths = [str(place.peers), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return common.spawn(command, place.output, **variables)
