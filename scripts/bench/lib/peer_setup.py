"""The peers' packages, each in an environment of its own under `.venv-peers`, made once.

An environment sees what `.venv` has, so all that is compared runs with the same torch, and pip
installs only what is missing there. A stamp says what an environment was made from; where nothing
changed since, it is used as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib import common

ENVIRONMENTS = common.REPOSITORY / ".venv-peers"
CONSTRAINTS = common.REPOSITORY / "constraints.txt"
INTO = "{site}"
"""In the arguments for pip: the environment's directory of packages."""


@dataclass(frozen=True)
class Way:
    """One way to install a package: the arguments of `pip install`, call by call."""

    calls: tuple[tuple[str, ...], ...]
    remark: str = ""
    """What the tables say of a version that came this way."""


@dataclass(frozen=True)
class Peer:
    """A package that autoglm is compared with; the first of its ways that works is taken."""

    package: str
    imports: str
    """What has to be importable then, separated by commas."""
    ways: tuple[Way, ...]


NVRX = Peer(
    "nvidia-resiliency-ext",
    "nvidia_resiliency_ext.fault_tolerance.launcher",
    (
        Way((("nvidia-resiliency-ext==0.7.0",),)),
        Way(
            (
                (
                    *("defusedxml", "fastapi", "grpcio>=1.76", "httpx", "protobuf"),
                    *("pydantic-settings", "slowapi", "uvicorn"),
                ),
                (
                    *("--no-deps", "--target", INTO, "--platform=manylinux_2_39_x86_64"),
                    *("--python-version=3.12", "--only-binary=:all:"),
                    "nvidia-resiliency-ext==0.7.0",
                ),
            ),
            "the Python part of its wheel for Python 3.12 and glibc 2.39",
        ),
        Way((("nvidia-resiliency-ext", "defusedxml"),), "the newest that installs here"),
    ),
)
DLROVER = Peer(
    "dlrover",
    "dlrover.trainer.torch.main,dlrover.python.master.local_master",
    # It does not bring all that it imports.
    (Way((("dlrover==0.6.1", "grpcio", "kubernetes", "protobuf"),)),),
)
LM_RESILIENCY = Peer("lm-resiliency", "lm_resiliency", (Way((("lm-resiliency==0.2.0",),)),))


@dataclass(frozen=True)
class Installed:
    """A peer that is there."""

    python: str
    """Runs with its package."""
    version: str
    """And the way it came, if that is not the plain one."""


class NotInstalled(Exception):
    """A peer cannot be had here; the message says why."""


def set_up(peer: Peer, environments: Path = ENVIRONMENTS) -> Installed:
    """The environment of a peer, made if need be. Raises NotInstalled."""
    directory = environments / peer.package
    stamp, key = directory / "ready.json", key_of(peer, directory)
    with _alone(environments):
        found = _read(stamp)
        if found.get("key") != key:
            common.say(f"installing {peer.package} into {directory}")
            found = {"key": key, "version": _make(peer, directory)}
            stamp.write_text(json.dumps(found))
    return Installed(str(_python(directory)), found["version"])


def _make(peer: Peer, directory: Path) -> str:
    """Install by the first way that works; returns the version. Raises NotInstalled."""
    why: list[str] = []
    for way in peer.ways:
        shutil.rmtree(directory, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(directory)])
        site = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
        (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        python = str(_python(directory))
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        shown = f"from importlib import metadata; print(metadata.version({peer.package!r}))"
        try:
            for call in way.calls:
                words = [word.replace(INTO, str(site)) for word in call]
                _run([*pip, "--constraint", str(CONSTRAINTS), *words])
            _run([python, "-c", f"import {peer.imports}"])
            version = _run([python, "-c", shown])
        except NotInstalled as error:
            why.append(str(error))
        else:
            return f"{version} ({way.remark})" if way.remark else version
    raise NotInstalled("; ".join(dict.fromkeys(why)))


def _run(command: list[str]) -> str:
    """What a command prints. Raises NotInstalled with the last line of its complaint."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said
        raise NotInstalled(errors[-1].strip() if errors else f"exit code {done.returncode}")
    return done.stdout.strip()


def _python(directory: Path) -> Path:
    return directory / "bin" / "python"


def key_of(peer: Peer, directory: Path) -> str:
    """Of all that an environment depends on; also its place, as it cannot be moved."""
    parts = (peer, str(directory), sys.prefix, sys.version, CONSTRAINTS.read_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _read(stamp: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return found


@contextmanager
def _alone(environments: Path) -> Iterator[None]:
    """Two programs at once would trip over each other."""
    environments.mkdir(parents=True, exist_ok=True)
    with (environments / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
