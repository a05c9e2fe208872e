"""From a fresh process to the user's script: what every rank does first and last.

Reached from a zygote's fork, from a cold start (`python -m autoglm_resume.worker.rank`), and from
torchrun, which starts the same module.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

from autoglm_resume import events, files, linux, output
from autoglm_resume.errors import CheckpointError, Interrupted, UsageError
from autoglm_resume.protocol.assignment import ASSIGNMENT, HOME, STACKS, Assignment, Source
from autoglm_resume.protocol.heartbeats import Board, Phase
from autoglm_resume.protocol.own_path import drop_own_path
from autoglm_resume.worker import ahead, environment_reads, imports, main_module
from autoglm_resume.worker.base import forks
from autoglm_resume.worker.base.event_log import EventLog
from autoglm_resume.worker.refusing import is_refusal, told

UNDER_TORCHRUN = "--under-torchrun"

_kept: list[TextIO] = []
_reserve: list[int] = []
"""Descriptors for the record of a script that has used up all the others."""
_OWN_FILES = (
    __file__,
    main_module.__file__,
    importlib.util.__file__,  # which may be frozen, and then has two names
    "<frozen importlib.util>",
    "<frozen importlib._bootstrap>",
)


def settle(assignment: Assignment, rank: int, environment: Mapping[str, str]) -> None:
    """Make this process rank `rank`: session, logs, `environment`, signals."""
    detach(assignment.log(rank), assignment.source.workdir)
    assume(assignment, rank, environment)


def detach(log: Path, workdir: str) -> None:
    """Make this process one of its own: session, signals, random numbers, directory, output."""
    forks.begin()
    if os.getsid(0) != os.getpid():
        os.setsid()  # so that the supervisor can end what the rank started, with the rank
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    _redirect(log)
    os.chdir(workdir)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # forked ranks would all share the zygote's state


def assume(assignment: Assignment, rank: int, environment: Mapping[str, str]) -> None:
    """Make this process, which is detached, rank `rank` of an attempt."""
    _redirect(assignment.log(rank))
    environment_reads.assume(environment)
    faulthandler.enable(all_threads=True)
    with contextlib.suppress(OSError):
        stacks = assignment.stacks(rank).open("w")
        faulthandler.register(STACKS, file=stacks, all_threads=True)
        _kept.append(stacks)  # faulthandler knows only its descriptor
    with contextlib.suppress(OSError):
        _reserve.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2))
    with contextlib.suppress(OSError, ValueError):
        Board.open(Path(assignment.board)).pulse(rank).phase(Phase.NONE)
    log = EventLog(assignment.events(rank), rank)
    log.emit(events.RankStarted(pid=os.getpid()))
    # Registered before the script registers anything, so it runs behind all of that.
    forks.at_exit(lambda: log.emit(events.RankFinished()))


def run(assignment: Assignment, rank: int) -> int:
    """Run the user's script to its end and return the exit code of this process."""
    environment_reads.watch()
    ahead.keep(lambda module, reason: start_over(assignment, rank, module, reason))
    code = execute(assignment.source, lambda error: record(assignment, rank, error))
    # Below torchrun nobody but torchrun can reap this process and see its code.
    EventLog(assignment.events(rank), rank).emit(events.RankEnded(code=code))
    return code


def start_over(assignment: Assignment, rank: int, module: str, reason: str) -> NoReturn:
    """Begin the script again as the same process, with nothing imported ahead of it: `module` was,
    and the script would not have imported the same, for `reason`.
    """
    log = EventLog(assignment.events(rank), rank)
    log.emit(events.StartedOver(module=module, reason=reason))
    distributed = sys.modules.get("torch.distributed")
    if ahead.under_way or (distributed is not None and distributed.is_initialized()):
        # The others have met it as it is. The next attempt imports nothing ahead.
        record(assignment, rank, RuntimeError(reason))
        log.emit(events.RankEnded(code=1))
        os._exit(1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os.chdir(HOME)
    command = [sys.executable, "-m", "autoglm_resume.worker.rank"]
    os.execve(sys.executable, command, environment_reads.before())


def execute(source: Source, failed: Callable[[BaseException], None]) -> int:
    """Run the user's script and return the exit code; `failed` gets an exception that ends it.

    Raises SystemExit, as the end of a script without us does, in a process that the script forked.
    """
    code = 0
    try:
        _execute(source)
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if forks.is_helper():
            traceback.print_exception(type(error), error, _script_part(error))
        else:
            failed(error)
            if isinstance(error, UsageError) and is_refusal(error):
                code = error.exit_code
    if forks.is_helper():
        sys.exit(code)
    return code


def home_of(source: Source) -> str:
    """Where the script's own modules lie: the first place on its path."""
    if source.script is None:
        return source.workdir
    return str(Path(source.script).resolve().parent)  # as Python does for a link


def _execute(source: Source) -> None:
    sys.argv = [source.script or "-m", *source.args]
    sys.path.insert(0, home_of(source))
    imports.begin()
    if source.script is not None:
        main_module.run_script(source.script)
    else:
        assert source.module is not None
        main_module.run_module(source.module)


def record(assignment: Assignment, rank: int, error: BaseException) -> None:
    """Keep the exception that ended the script, beside the logs, before anything else happens.

    So the *first* failing rank can be told from the ones that failed because of it.
    """
    trace = _script_part(error)
    lines = traceback.format_exception(type(error), error, trace)
    misused = isinstance(error, UsageError) and is_refusal(error)
    with contextlib.suppress(OSError):  # of a full disk, whose story the record must not miss
        sys.stderr.write(_told(error) or "".join(lines))
        sys.stderr.flush()
    while _reserve:
        with contextlib.suppress(OSError):
            os.close(_reserve.pop())
    record = {
        "rank": rank,
        "type": type(error).__name__,
        "message": _message(error)[:10_000],
        "traceback": _shortened("".join(lines)),
        "mono": time.monotonic(),
        "misused": misused,
        "hint": error.hint if isinstance(error, UsageError) else "",
    }
    with contextlib.suppress(OSError):
        files.write(assignment.error(rank), json.dumps(record).encode())


def _told(error: BaseException) -> str:
    """What a person should read of what we refuse: not where in our code it was."""
    if isinstance(error, UsageError | CheckpointError) and is_refusal(error):
        return f"autoglm: {told(error)}\n"
    return ""


def _shortened(text: str, most: int = 100_000) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n…\n{text[-half:]}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return f"<{type(error).__name__} that cannot be printed>"


def _script_part(error: BaseException) -> TracebackType | None:
    """The traceback without our own frames at its top."""
    start = trace = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename in _OWN_FILES:
        start = start.tb_next
    if start is not None or isinstance(error, SyntaxError):
        return start  # a script that does not compile has no frames of its own
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    none = trace is None or trace.tb_frame.f_code.co_filename == main_module.__file__
    return None if none else error.__traceback__  # there is nothing of that name to run


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{end.code}\n")
    return 1


def _redirect(log: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(nothing)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        # Lines reach the log when they are printed, not when the rank is dead.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]


def _parent_of(pid: int) -> int:
    """Parent of another process, 0 if it is gone."""
    with contextlib.suppress(OSError):
        # The name in parentheses may hold anything, even a parenthesis.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def main() -> None:
    """A rank in a process of its own: a cold start, or a child of torchrun."""
    output.begin(noting=True)
    assignment = Assignment.load(Path(os.environ[ASSIGNMENT]))
    drop_own_path()
    parent = os.getppid()
    under_torchrun = UNDER_TORCHRUN in sys.argv
    if under_torchrun and _parent_of(parent) != assignment.supervisor:
        sys.exit(1)  # torchrun died before this line, and others adopted its child
    linux.die_with_parent(parent if under_torchrun else assignment.supervisor)
    rank = int(os.environ["RANK"])
    if under_torchrun:
        # Its own agent serves the store, so the rest of its contract must stand as it is.
        environment = {"TORCHELASTIC_RESTART_COUNT": str(assignment.attempt)}
    else:
        environment = assignment.rank_environment(rank)
    settle(assignment, rank, environment)
    code = run(assignment, rank)
    # torchrun ends the others, in the middle of their saves, when one ends with anything but 0.
    sys.exit(0 if under_torchrun and code == Interrupted.exit_code else code)


if __name__ == "__main__":
    main()
