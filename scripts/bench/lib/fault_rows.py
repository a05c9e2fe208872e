"""The faults that `faults` injects, and what each has to come to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import fault_means as means
from lib.fault_bed import PATIENCE, RANKS, Bed

AT = 62
"""Step at which scripts fail; the run has checkpoints by then."""
MOST_MEMORY = 256 << 20
"""Bytes that a supervisor may take, whatever its ranks print."""


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    strike: Callable[[Bed], object] | None = None
    """Injects it from outside into a run that has begun; None if the script does it itself."""
    prepare: Callable[[Bed], object] = lambda _: None
    """Before the run begins."""
    words: tuple[str, ...] = ()
    """Arguments of the script."""
    kinds: str = ""
    """Classes of all failures in turn, those in a row that are alike once; “|” where either is
    right. A straggler, which is no failure, counts as one."""
    answers: str = ""
    """Actions of all decisions, in the same way."""
    root: int | None = None
    """The rank that failed first, where there is one."""
    code: int = 0
    """Exit code of the last command."""
    steps: int = 100
    pause: float = 0.03
    job: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    patience: float = PATIENCE
    quick: bool = False


def _script(name: str, fail: str, kinds: str, answers: str = "restart", **more: Any) -> Fault:
    words = (f"--fail={fail}", f"--at={AT}", *more.pop("words", ()))
    return Fault(name, words=words, kinds=kinds, answers=answers, **more)


def _signal(name: str, number: int, kinds: str, rank: int = 1, **more: Any) -> Fault:
    def strike(bed: Bed) -> None:
        bed.wait_saved()
        bed.kill(rank, number)

    return Fault(name, strike, kinds=kinds, answers="restart", root=rank, **more)


def _kill_all(bed: Bed) -> None:
    bed.wait_saved()
    pids = bed.pids()
    bed.strike()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)


def _kill_in_start_up(bed: Bed) -> None:
    bed.wait("attempt_started", seconds=PATIENCE)
    bed.kill(1)


def _corrupt_newest(bed: Bed) -> None:
    bed.wait_saved()
    means.flip(_checkpoints(bed)[-1])
    bed.kill(1)


def _corrupt_newest_and_kill_supervisor(bed: Bed) -> None:
    _kill_supervisor(bed, lambda: means.flip(_checkpoints(bed)[-1]))
    bed.wait("first_step", lambda event: event["attempt"] > 0)
    rejected = [v for e in bed.events("gate") for v in e["verdicts"] if not v["accepted"]]
    if not rejected:
        bed.notes.append("no checkpoint was rejected")


def _corrupt_all(bed: Bed) -> None:
    def corrupt() -> None:
        for checkpoint in _checkpoints(bed):
            means.flip(checkpoint)

    _kill_supervisor(bed, corrupt)


def _checkpoints(bed: Bed) -> list[Path]:
    return sorted(path.parent for path in bed.checkpoints.glob("step-*/manifest.json"))


def _kill_supervisor(bed: Bed, then: Callable[[], object] = lambda: None) -> None:
    bed.wait_saved()
    bed.strike()
    bed.processes[-1].kill()
    bed.processes[-1].wait()
    deadline = time.monotonic() + 2.0
    while bed.own() and time.monotonic() < deadline:
        time.sleep(0.01)
    if left := bed.own():
        bed.notes.append(f"{len(left)} processes outlived the supervisor by 2 s")
    then()
    bed.resume()


def _kill_zygote(bed: Bed) -> None:
    bed.wait_saved()
    os.kill(bed.events("zygote_ready")[-1]["pid"], signal.SIGKILL)
    bed.wait("zygote_lost")
    bed.kill(1)


def _kill_saver(bed: Bed) -> None:
    bed.wait_saved(1)
    savers = bed.own("saver_process")
    bed.strike()
    for saver in savers:
        saver.kill()
    if not savers:
        bed.notes.append("no saver was found")


def _freeze(bed: Bed, group: Path) -> None:
    # Twenty steps and more: before, nobody can know how long this run's ranks may be silent.
    bed.wait("committed", lambda event: event["step"] >= 40, PATIENCE)
    for pid in bed.pids().values():
        (group / "cgroup.procs").write_text(str(pid))
    bed.strike()
    (group / "freezer.state").write_text("FROZEN")


def _freeze_a_while(bed: Bed) -> None:
    group = means.freezer(bed)
    _freeze(bed, group)
    time.sleep(8.0)  # it comes back when the hang must have been noticed
    (group / "freezer.state").write_text("THAWED")


def _freeze_for_good(bed: Bed) -> None:
    group = means.freezer(bed)
    _freeze(bed, group)
    if (code := bed.wait_end(90)) != 75:
        bed.notes.append(f"exit code {code}, not 75")
    (group / "freezer.state").write_text("THAWED")
    bed.resume()


def _fill_disk(bed: Bed) -> None:
    bed.wait_saved()
    bed.strike()
    hog = means.fill(bed.checkpoints.parent)
    bed.wait("decision", lambda event: event["action"] == "pause")
    hog.unlink()


def _lock_disk(bed: Bed) -> None:
    disk = bed.checkpoints.parent
    bed.wait_saved()
    means.read_only(disk)
    bed.strike()
    bed.wait("decision", lambda event: event["action"] == "pause")
    means.writable(disk)


def _storm(bed: Bed) -> None:
    bed.wait_saved(1)
    bed.strike()
    supervisor = bed.processes[-1]
    while supervisor.poll() is None:
        supervisor.terminate()
        time.sleep(0.0005)
    if supervisor.returncode != 75:
        bed.notes.append(f"exit code {supervisor.returncode}, not 75")
    if (stops := len(bed.events("stop_requested"))) != 1:
        bed.notes.append(f"{stops} stops")
    bed.resume()


def _jump(bed: Bed) -> None:
    day = 86400
    bed.wait_saved(1)
    means.set_ahead(bed, day)
    bed.wait_saved(3)
    bed.kill(1)
    bed.wait("attempt_started", lambda event: event["attempt"] == 1)
    means.set_ahead(bed, -day)
    bed.wait("first_step", lambda event: event["attempt"] == 1)
    times = [event["time"] for event in bed.journal.all]
    if max(times) - min(times) < day:
        bed.notes.append("the clock did not jump")


def _look_at_memory(bed: Bed) -> None:
    most = 0
    while bed.processes[-1].poll() is None:
        status = Path(f"/proc/{bed.processes[-1].pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        most = max([most, *(int(line.split()[1]) << 10 for line in lines)])
        time.sleep(0.05)
    if most > MOST_MEMORY:
        bed.notes.append(f"the supervisor took {most >> 20} MiB")
    if (log := bed.run_dir / "attempts" / "000" / "rank-1.log").stat().st_size < 1 << 30:
        bed.notes.append(f"{log.name} lacks lines")


def _count_processes(bed: Bed) -> None:
    before = 1 + RANKS + RANKS + 1  # supervisor, ranks, savers, zygote
    bed.wait("first_step", lambda event: event["attempt"] == 1, PATIENCE)
    if len(now := bed.own()) > before + 1:
        bed.notes.append(f"{len(now)} processes after the restart")


NONE = "none"
"""No failure, or no decision."""
SOON = {"heartbeat": {"timeout": "5s"}}
"""By default a rank that computes has minutes, and one that does nothing half of one: it may be
what the script wants. These rows have a limit of their own, for the sake of the bench's time."""

FAULTS = (
    _signal("kill -9 of a rank", signal.SIGKILL, "killed", quick=True),
    _signal("kill -11 of a rank", signal.SIGSEGV, "crashed"),
    _signal("kill -6 of a rank", signal.SIGABRT, "crashed"),
    _signal("kill -15 of a rank", signal.SIGTERM, "preempted"),
    Fault("kill -9 of all ranks", _kill_all, kinds="killed", answers="restart", quick=True),
    Fault("kill -9 in start-up", _kill_in_start_up, kinds="killed", answers="restart", root=1),
    _script("exit code 1", "exit", "exited", words=("--code=1",), root=1),
    _script("exit code 17", "exit", "exited", root=1),
    _script("exit code 93", "exit", "exited", "give_up", words=("--code=93",), root=1, code=93),
    _script("exception before the first step", "early", "exception", root=1),
    _script("exception after the first step", "raise", "exception", root=1, quick=True),
    _script("import error", "import", "launch", root=1),
    _script(
        "the same exception over and over",
        "again",
        "exception, code_error",
        "restart, roll_back, give_up",
        checkpoint={"on_busy": "wait"},
        root=1,
        code=1,
    ),
    _script("unreadable sample", "loader", "data_error", root=1),
    # The checkpoint of step 65 has weights that are not finite.
    _script(
        "NaN loss",
        "nan",
        "diverged",
        "roll_back",
        words=("--at=63",),
        checkpoint={"on_busy": "wait"},
        quick=True,
    ),
    _signal("SIGSTOP of a rank", signal.SIGSTOP, "hang", quick=True),
    _signal("SIGSTOP of rank 0", signal.SIGSTOP, "hang", rank=0),
    _script("deadlocked collective", "deadlock", "hang|communication", job=SOON),
    _script("lost connections", "cut", "communication"),
    _script("loop that holds the GIL", "hold-lock", "hang", root=1, job=SOON),
    _script(
        "sleeping data loader",
        "sleepy-data",
        "hang",
        root=1,
        job=SOON,
        quick=True,
    ),
    Fault(
        "slow rank",
        words=("--fail=slow",),
        kinds="straggler",
        answers=NONE,
        root=1,
        steps=330,
        pause=0.0,
        patience=90,
    ),
    _script(
        "memory leak in a cgroup",
        "leak-memory",
        "host_oom",
        root=1,
        prepare=lambda bed: means.memory_limit(bed, 4 << 30),
        quick=True,
    ),
    _script("file descriptor leak", "leak", "exception", root=1),
    _script("data loader leaking workers", "leak-workers", "killed", strike=_count_processes),
    _script("log flood of 1 GB", "flood", NONE, NONE, strike=_look_at_memory),
    Fault(
        "full disk", _fill_disk, means.small_disk, kinds="disk_full", answers="pause", quick=True
    ),
    Fault("read-only disk", _lock_disk, means.small_disk, kinds="storage", answers="pause"),
    Fault("corrupt newest checkpoint", _corrupt_newest, kinds="killed", answers="restart", root=1),
    Fault(
        "corrupt newest, supervisor killed",
        _corrupt_newest_and_kill_supervisor,
        kinds=NONE,
        answers=NONE,
        quick=True,
    ),
    Fault("all checkpoints corrupt", _corrupt_all, kinds=NONE, answers=NONE, code=90),
    Fault("killed zygote, then a rank", _kill_zygote, kinds="killed", answers="restart", root=1),
    Fault("killed savers", _kill_saver, kinds=NONE, answers=NONE, quick=True),
    Fault("killed supervisor", _kill_supervisor, kinds=NONE, answers=NONE, quick=True),
    Fault("SIGTERM storm", _storm, kinds=NONE, answers=NONE),
    _script("port taken", "steal-port", "port_in_use", root=0),
    Fault(
        "machine frozen for a while",
        _freeze_a_while,
        kinds="hang",
        answers="restart",
        job=SOON,
    ),
    Fault(
        "machine frozen for good",
        _freeze_for_good,
        kinds="hang",
        answers=NONE,
        patience=120,
        job=SOON,
    ),
    Fault(
        "clock a day ahead, then behind",
        _jump,
        means.false_clock,
        kinds="killed",
        answers="restart",
        root=1,
    ),
)
