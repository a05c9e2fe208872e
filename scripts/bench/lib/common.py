"""What the programs of scripts/bench share: arguments, environment, jobs, tables, results.

A program here prints one table per thing it measures on standard output, its progress on standard
error, writes everything as JSON with `--json`, and exits 1 when a check fails. This module imports
nothing but the standard library, because it runs before the environment is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

BENCH = Path(__file__).resolve().parents[1]
SCRIPTS = BENCH / "scripts"
"""What the programs have trained."""
REPOSITORY = BENCH.parents[1]
WORK = REPOSITORY / ".bench"
"""Everything a program here leaves behind."""


def _in_project_python() -> None:
    """Return in a Python that has this autoglm and torch: this one, or else the one of `.venv`."""
    package = importlib.util.find_spec("autoglm_resume")
    here = package is not None and Path(package.origin or "").is_relative_to(REPOSITORY)
    if here and importlib.util.find_spec("torch"):
        return
    python = REPOSITORY / ".venv" / "bin" / "python"
    if Path(sys.prefix) == python.parent.parent:
        sys.exit(f"{python}: autoglm_resume cannot be imported; remove .venv and try again")
    # With what the tests need, too: one set-up serves both, and `corruption` wants safetensors.
    set_up = ["bash", "-c", 'extra=test; source "$0"', str(REPOSITORY / "scripts" / "setup-venv")]
    if code := subprocess.run(set_up, stdout=sys.stderr).returncode:
        sys.exit(code)
    os.execv(python, [str(python), *sys.argv])


def arguments(
    description: str | None, add: Callable[[argparse.ArgumentParser], object] | None = None
) -> argparse.Namespace:
    """The command line that every program has, and what `add` adds to it.

    Returns in a Python that has all that the project needs, so a program imports nothing else
    before; only `--help` is answered by any.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    if add is not None:
        add(parser)
    chosen = parser.parse_args()
    _in_project_python()
    if chosen.json is not None:
        chosen.json = chosen.json.absolute()
    return chosen


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def fresh_directory(name: str) -> Path:
    """An empty directory of this name for a program's files."""
    path = WORK / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


# Results


@dataclass(frozen=True)
class Check:
    """One figure that has to be reached."""

    name: str
    measured: float
    required: float
    unit: str
    ok: bool

    @classmethod
    def at_most(cls, name: str, measured: float, required: float, unit: str = "") -> Check:
        """Passes if `measured` is not above `required`."""
        return cls(name, measured, required, unit, measured <= required)

    @classmethod
    def at_least(cls, name: str, measured: float, required: float, unit: str = "") -> Check:
        """Passes if `measured` is not below `required`."""
        return cls(name, measured, required, unit, measured >= required)


@dataclass
class Report:
    """What a program found out; `rounds` are the raw figures, `results` what follows from them."""

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def finish(self, path: Path | None) -> NoReturn:
        """Print the checks, write JSON to `path` if there is one, and exit: 1 if a check failed."""
        rows = [
            (check.name, check.measured, check.required, check.unit, "ok" if check.ok else "FAILED")
            for check in self.checks
        ]
        table("checks", ("check", "measured", "required", "unit", ""), rows)
        if path is not None:
            document = {"benchmark": self.name, "machine": machine(), **asdict(self)}
            del document["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n")
        sys.exit(0 if all(check.ok for check in self.checks) else 1)


def median(values: Iterator[float] | Sequence[float]) -> float:
    """The median; of nothing, not a number."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, figures to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [
        all(isinstance(row[n], (int, float)) or row[n] in ("", None) for row in rows)
        for n in range(len(headers))
    ]
    print(f"\n{title}")
    for line in (list(headers), ["-" * width for width in widths], *cells):
        texts = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        )
        print("  " + "  ".join(texts).rstrip())
    sys.stdout.flush()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_line("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load_average": os.getloadavg()[0],
    }


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


# Processes


def autoglm(python: str = sys.executable) -> list[str]:
    """The `autoglm` command of a Python, installed or not."""
    installed = Path(python).with_name("autoglm")
    if installed.exists():
        return [str(installed)]
    return [python, "-c", "from autoglm_resume.cli.app import main; main()"]


def python_of(checkout: Path) -> str:
    """The Python of another checkout. Exits where it was not set up."""
    python = checkout.resolve() / ".venv" / "bin" / "python"
    if not python.exists():
        sys.exit(f"no {python}: expected a checkout in which scripts/setup-venv was run")
    return str(python)


def environment() -> dict[str, str]:
    """For everything that is compared: one thread per process, and compiled modules are kept."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    # Runs of a bench are nobody's: they do not join the user's list.
    state = str(WORK / "state")
    return {**inherited, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": state}


def write_job(directory: Path, **fields: Any) -> Path:
    """A job file in `directory`, whose run is `directory`/run; JSON is YAML."""
    path = directory / "job.yaml"
    path.write_text(json.dumps({"name": "bench", "run_dir": str(directory / "run"), **fields}))
    return path


def spawn(command: Sequence[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start `command` with its output in the file `output` and more environment variables."""
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def end(process: subprocess.Popen[bytes], pids: Mapping[int, int] | None = None) -> None:
    """Kill a process that still runs, and the ranks with these `pids` that may outlive it."""
    if process.poll() is None:
        process.kill()
        process.wait()
        for pid in (pids or {}).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Lines:
    """JSON lines of a file that others append to; one that a kill cut short is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last call; they also join `all`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        self.all += found
        return found


class Stuck(SystemExit):
    """What was waited for did not come: ends the program with a message and exit code 1."""


def wait_for(
    condition: Callable[[], bool],
    what: str,
    process: subprocess.Popen[bytes],
    log: Path,
    seconds: float = 120.0,
    pause: float = 0.002,
) -> None:
    """Poll `condition`. Raises Stuck if `process` ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process.poll() is not None
        if ended and condition():
            return
        if ended or time.monotonic() > deadline:
            how = f"exit code {process.returncode}" if ended else f"nothing for {seconds:.0f} s"
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise Stuck(f"waiting for {what}: {how}\n{tail}")
        time.sleep(pause)
