"""Real runs of the real command, and waiting for what their journals say."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from autoglm_resume import journal
from autoglm_resume.events import to_record
from autoglm_resume.linux import DirectoryWatch
from autoglm_resume.supervise.core.drill import parse
from tests.patience import PATIENCE, soon

TRAIN = Path(__file__).with_name("train.py")

Event = dict[str, Any]


class Rehearsal:
    """A job in a directory of its own, and the `autoglm` processes that ran it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "runs" / "job"
        self.checkpoints = self.run_dir / "checkpoints"
        self.processes: list[subprocess.Popen[str]] = []
        self.around: tuple[str, ...] = ()
        """A command that runs the command."""
        self.job: dict[str, Any] = {
            "script": str(TRAIN),
            "nproc_per_node": 2,
            "checkpoint": {"every": {"steps": 5}, "keep": 3, "on_busy": "wait"},
            "heartbeat": {"timeout": "60s"},
            "restart": {"backoff": "10ms", "max_backoff": "50ms"},
            "guards": {"free_disk": 0},
        }

    def write(self, *args: str, **fields: Any) -> Path:
        """The job file, with the script's arguments and more fields."""
        path = self.directory / "job.yaml"
        path.write_text(yaml.safe_dump({**self.job, **fields, "args": list(args)}))
        return path

    def command(self, *words: str, hold: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """An `autoglm` command, begun; see `holding.hold`."""
        process = subprocess.Popen(
            [*self.around, sys.executable, "-m", "autoglm_resume.cli", *words],
            cwd=self.directory,
            env={**os.environ, "REHEARSAL": str(self.directory), "HOLD": " ".join(hold)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def start(
        self,
        *args: str,
        drill: tuple[str, ...] = (),
        hold: tuple[str, ...] = (),
        **fields: Any,
    ) -> Any:
        """`autoglm run` of the job, begun: one drill per attempt, for which it waits."""
        drills = [word for spec in drill for word in ("--drill", spec)]
        held = [
            f"{attempt}:{each.rank or 0}:{each.step + 1}"
            for attempt, each in enumerate(parse(drill, world_size=8))
            if each.step is not None and each.kind != "exit"  # a rank exits when it ends a step
        ]
        job = str(self.write(*args, **fields))
        return self.command("run", job, *drills, hold=(*held, *hold))

    def release(self, step: int) -> None:
        """Let go of the rank that is held before `step`."""
        (self.directory / f"go-on-{step}").touch()

    def run(self, *args: str, **fields: Any) -> Finished:
        """`autoglm run` of the job, to its end."""
        return finish(self.start(*args, **fields))

    def stop(self, release: int, process: Any, number: int = signal.SIGTERM) -> None:
        """Ask a run to stop that is held before the step `release`, and let go of it then."""
        process.send_signal(number)
        self.wait_for("stop_requested")
        self.release(release)

    def run_to_12(self, **fields: Any) -> None:
        """A run that has checkpoints of steps 5, 10 and 12, where it was stopped."""
        process = self.start(hold=("0:0:12",), **fields)
        self.wait_for("committed", lambda event: event["step"] == 10)
        self.stop(12, process)
        assert finish(process).code == 75

    def resume(self) -> Finished:
        """`autoglm resume`, to its end."""
        return finish(self.command("resume", str(self.run_dir)))

    def events(self, kind: str | None = None) -> list[Event]:
        """The journal."""
        events = [to_record(event) for event in journal.read(self.run_dir / "events.jsonl")]
        return [e for e in events if kind is None or e["event"] == kind]

    def wait_for(self, kind: str, matches: Callable[[Event], bool] = lambda _: True) -> Event:
        """The first such event of the journal, waiting until it is there."""
        deadline = soon()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        watch = DirectoryWatch()
        watch.add(self.run_dir)
        with selectors.DefaultSelector() as selector:
            selector.register(watch, selectors.EVENT_READ)
            while True:
                for event in self.events(kind):
                    if matches(event):
                        watch.close()
                        return event
                # Without one, a scheduler started the run.
                ended = bool(self.processes) and self.processes[-1].poll() is not None
                if ended or time.monotonic() > deadline:
                    raise AssertionError(f"no {kind} event; the journal has {self.events()}")
                selector.select(1.0)
                list(watch.changed())

    def final(self) -> dict[str, str]:
        """Digests of what the run ended with; generators of unseeded libraries left out."""
        objects: dict[str, str] = self.events("run_completed")[-1]["objects"]
        return {name: digest for name, digest in objects.items() if name != "rng"}

    def holder(self) -> int:
        """Process id of the supervisor."""
        return int(json.loads((self.run_dir / "lock").read_text())["pid"])

    def workers(self) -> list[psutil.Process]:
        """Zygotes, ranks and what they started, of this run."""
        return [p for p in psutil.process_iter() if _works_for(p, self.directory)]

    def savers(self) -> list[psutil.Process]:
        """Those of them that persist snapshots."""
        named = "autoglm_resume.savers.saver_process"
        return [p for p in self.workers() if named in command_of(p)]

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
        self.kill_workers()

    def kill_workers(self) -> None:
        """Those that have not ended meanwhile."""
        for process in self.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Finished:
    """A command that has ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def all_dead(processes: list[psutil.Process]) -> bool:
    """Whether the processes, which would not do so by themselves, end; reaped or not."""
    deadline = soon()
    for process in processes:
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            ended = selector.select(max(0.0, deadline - time.monotonic()))
        os.close(fd)
        if not ended:
            return False
    return True


def fill(disk: Path) -> Path:
    """Write to `disk` until nothing more fits; returns the file."""
    hog = disk / "hog"
    with hog.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * 4096)
            except OSError:
                return hog


def finish(process: subprocess.Popen[str], within: float = PATIENCE) -> Finished:
    """Wait for the end of a command."""
    out, err = process.communicate(timeout=within)
    return Finished(process.returncode, out, err)


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; none of one that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _works_for(process: psutil.Process, directory: Path) -> bool:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    return environment.get("REHEARSAL") == str(directory) and process.pid != os.getpid()


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rehearsal]:
    """A place to run jobs in; all its processes are gone afterwards."""
    monkeypatch.setenv("REHEARSAL", str(tmp_path))
    place = Rehearsal(tmp_path)
    yield place
    place.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the job ends with when nothing happens to it."""
    place = Rehearsal(tmp_path_factory.mktemp("undisturbed"))
    try:
        finished = place.run()
        assert finished.code == 0, finished
        return place.final()
    finally:
        place.end()


@pytest.fixture(scope="session")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the job that was stopped at step 12, for all that look at what can go on from it."""
    place = Rehearsal(tmp_path_factory.mktemp("stopped"))
    try:
        place.run_to_12()
        # A copy beside the run that it is of is refused; one of a run that is gone was moved.
        return place.run_dir.rename(place.directory / "stopped")
    finally:
        place.end()


@pytest.fixture
def interrupted(rehearsal: Rehearsal, stopped_once: Path) -> Rehearsal:
    """With that run, see `Rehearsal.run_to_12`."""
    shutil.copytree(stopped_once, rehearsal.run_dir, symlinks=True)
    return rehearsal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("mount is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
