"""One real run under autoglm that a fault is injected into, watched from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from lib import common

TRAIN = common.REPOSITORY / "tests" / "faults" / "train.py"
RANKS = 2
PATIENCE = 60.0
"""Seconds that anything may take."""
SHARED = Path("/dev/shm")
_OWN = "FAULTS_BED"
"""Environment variable by which the processes of a run are known."""
_WHEN = re.compile(r"^fault at ([0-9.]+)$", re.MULTILINE)

Event = dict[str, Any]


class Bed:
    """A run of tests/faults/train.py: two ranks, `steps` steps, a checkpoint every five."""

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        self.steps = steps
        self.directory = common.fresh_directory("faults/" + re.sub(r"\W+", "-", name))
        self.run_dir = self.directory / "run"
        self.checkpoints = self.run_dir / "checkpoints"
        self.output = self.directory / "output"
        self.journal = common.Lines(self.run_dir / "events.jsonl")
        self.variables = {_OWN: str(self.directory)}
        self.prefix: tuple[str, ...] = ()
        """Command that the supervisor is started by."""
        self.struck: float | None = None
        """Monotonic seconds of the injection, if it came from outside."""
        self.notes: list[str] = []
        """What else was seen to be wrong."""
        self.undo: list[Callable[[], object]] = []
        """What has to be put back on this machine."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self._shared = _names(SHARED)

    def start(self, words: Sequence[str], checkpoint: dict[str, Any], **fields: Any) -> None:
        """`autoglm run`; `words` are arguments of the script, `fields` more fields of the job."""
        job = common.write_job(
            self.directory,
            script=str(TRAIN),
            args=[f"--steps={self.steps}", *words],
            nproc_per_node=RANKS,
            checkpoint={"every": {"steps": 5}, "dir": str(self.checkpoints), **checkpoint},
            guards={"free_disk": 0},
            logs={"console": "none"},
            **{"restart": {"backoff": "10ms", "max_backoff": "50ms"}, **fields},
        )
        self.command("run", str(job))

    def command(self, *words: str) -> None:
        """An autoglm command, begun."""
        command = [*self.prefix, *common.autoglm(), *words]
        self.processes.append(common.spawn(command, self.output, **self.variables))

    def resume(self) -> None:
        """`autoglm resume`, begun."""
        self.command("resume", str(self.run_dir))

    def strike(self) -> None:
        """The fault is injected now."""
        self.struck = time.monotonic()

    # What it does

    def events(self, kind: str) -> list[Event]:
        """Those in the journal."""
        self.journal.new()
        return [event for event in self.journal.all if event["event"] == kind]

    def wait(
        self, kind: str, matches: Callable[[Event], bool] = lambda _: True, seconds: float = 30.0
    ) -> Event:
        """The first such event, as soon as it is there. Raises Stuck."""
        found: list[Event] = []

        def there() -> bool:
            found[:] = filter(matches, self.events(kind))
            return bool(found)

        process = self.processes[-1]
        common.wait_for(there, f"{kind} in {self.name}", process, self.output, seconds)
        return found[0]

    def wait_saved(self, count: int = 2) -> None:
        """Until there were checkpoints of so many steps."""
        steps: set[int] = set()

        def enough(event: Event) -> bool:
            steps.add(event["step"])
            return len(steps) >= count

        self.wait("committed", enough, PATIENCE)

    def wait_end(self, seconds: float = PATIENCE) -> int:
        """Exit code of the last command. Raises Stuck after so many seconds."""
        process = self.processes[-1]
        ended = lambda: process.poll() is not None  # noqa: E731
        common.wait_for(ended, f"the end of {self.name}", process, self.output, seconds, 0.01)
        self.journal.new()
        return process.returncode

    def pids(self) -> dict[int, int]:
        """Of the ranks of the last attempt."""
        started = self.events("attempt_started")[-1]
        return {int(rank): pid for rank, pid in started["pids"].items()}

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a rank a signal: that is the fault."""
        pid = self.pids()[rank]
        self.strike()
        os.kill(pid, number)

    def own(self, part: str = "") -> list[psutil.Process]:
        """Processes of this run that live, those with `part` in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get(_OWN) == str(self.directory)
                dead = process.status() == psutil.STATUS_ZOMBIE
                if ours and not dead and part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    # What it came to

    def moment(self) -> float | None:
        """Monotonic seconds of the injection, which the script says where it was its own."""
        if self.struck is not None:
            return self.struck
        for log in sorted(self.run_dir.glob("attempts/*/rank-*.log")):
            with log.open("rb") as file:
                if said := _WHEN.findall(file.read(1 << 20).decode(errors="replace")):
                    return float(said[-1])
        return None

    def final(self) -> dict[str, str] | None:
        """Digests of what the run ended with, None if it did not."""
        ended = self.events("run_completed")
        if not ended:
            return None
        return {name: digest for name, digest in ended[-1]["objects"].items() if name != "rng"}

    def leftovers(self) -> list[str]:
        """Processes of this run, and shared memory that nobody uses, two seconds after its end."""
        deadline = time.monotonic() + 2.0
        while self.own() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = [f"process {process.pid} {process.name()}" for process in self.own()]
        new = _names(SHARED) - self._shared
        if new:
            new -= _in_use()
        return found + [f"{SHARED}/{name}" for name in sorted(new)]

    def end(self) -> None:
        """Put everything back, whatever happened."""
        for undo in reversed(self.undo):
            undo()
        for process in self.own():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for command in self.processes:
            command.kill()
            command.wait()


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _in_use() -> set[str]:
    """Names in shared memory that a process of anybody's has mapped or open."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used.update(re.findall(r"/dev/shm/(\S+)", (process / "maps").read_text()))
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.update(re.findall(r"^/dev/shm/(\S+)", str(link.readlink())))
    return used
