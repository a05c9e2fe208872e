"""A real zygote, driven by the supervisor's own handle in a process of its own.

Most of these hide torch, which it passes over, to be ready at once; one test has the real torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autoglm_resume
from autoglm_resume.protocol.assignment import Assignment
from tests.patience import PATIENCE

HOME = Path(autoglm_resume.__file__).parent.parent
Make = Callable[..., Assignment]

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from dataclasses import replace
from autoglm_resume import linux
from autoglm_resume.supervise.ranks.group import WorkerGroup
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.ranks.zygote import Zygote, ZygoteState
from autoglm_resume.protocol.assignment import Assignment
import psutil
from autoglm_resume.events import to_record

linux.adopt_orphans()
loop = EventLoop()
told = []

def tell(event):
    record = to_record(event)
    told.append((record.pop("event"), record))

lost = []
stores = []
spares = []
assignment = replace(Assignment.load(Path(sys.argv[1])), supervisor=os.getpid())
assignment.path.write_bytes(assignment.to_json())
group = WorkerGroup(loop, lambda *_: None)

def soon():
    return time.monotonic() + 120

def zygote(*modules):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = Path(assignment.directory) / "zygote.log"
    made = Zygote(loop, environment, modules, log, tell,
                  lambda: lost.append(1), stores.append,
                  lambda pid, link: spares.append((pid, link)))
    loop.wait(lambda: made.state is not ZygoteState.BUSY, soon())
    return made

def fork(z, ranks=None):
    pids = z.fork(assignment.path, range(assignment.world_size) if ranks is None else ranks)
    for rank, pid in (pids or {}).items():
        group.add(rank, pid)
    return pids

def until(condition):
    assert loop.wait(condition, soon())

def log(rank):
    path = assignment.log(rank)
    return path.read_text() if path.exists() else ""

def until_says(rank, text):
    while text not in log(rank):
        loop.run(time.monotonic() + 0.005)

def finish(**answer):
    print(json.dumps(answer), flush=True)

"""


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., Any]:
    def drive(assignment: Assignment, code: str, *, torch: bool = False) -> Any:
        process = start_driver(assignment, code, tmp_path, torch=torch)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err + zygote_log(assignment)
        return json.loads(out)

    return drive


def zygote_log(assignment: Assignment) -> str:
    path = Path(assignment.directory) / "zygote.log"
    return path.read_text() if path.exists() else ""


def start_driver(
    assignment: Assignment, code: str, tmp_path: Path, *, torch: bool = False
) -> subprocess.Popen[str]:
    modules = tmp_path / "modules"
    modules.mkdir(exist_ok=True)
    if not torch:
        (modules / "torch.py").write_text("raise ImportError('hidden from this test')")
    (modules / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    path = os.pathsep.join([str(modules), str(HOME)])
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER + code, str(assignment.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_forked_ranks_are_our_children_with_true_exit_codes(
    assign: Make, drive: Callable[..., Any]
) -> None:
    assignment = assign(
        "import os, sys, random, numpy\n"
        "rank = int(os.environ['RANK'])\n"
        "print(os.getppid(), random.random(), numpy.random.rand(), __name__, flush=True)\n"
        "if rank == 2: os.kill(os.getpid(), 9)\n"
        "sys.exit(rank * 7)",
        world_size=3,
    )
    answer = drive(
        assignment,
        """
z = zygote("numpy.random", "yaml", "no_such_module")
state = z.state.name
pids = fork(z)
until(lambda: not group.alive)
exits = {rank: [how.code, how.signal] for rank, how in group.exits.items()}
again = fork(z, [0])
until(lambda: not group.alive)
z.close()
finish(state=state, told=told, pids=pids, exits=exits, me=os.getpid(), again=again,
       logs=[log(rank) for rank in range(3)], left=len(psutil.Process().children()))
""",
    )
    assert answer["state"] == "READY"
    (ready,) = answer["told"]
    assert ready[0] == "zygote_ready"
    assert any("no_such_module: ModuleNotFoundError" in line for line in ready[1]["skipped"])
    assert answer["exits"] == {"0": [0, None], "1": [7, None], "2": [None, 9]}
    lines = [line.split() for text in answer["logs"] for line in text.splitlines()]
    assert len(lines) == 4, "the second fork of rank 0 went on with its log"
    assert {int(line[0]) for line in lines} == {answer["me"]}, "the driver adopted them"
    assert len({line[1] for line in lines}) == 4, "siblings share no state of random"
    assert len({line[2] for line in lines}) == 4, "nor of numpy.random"
    assert {line[3] for line in lines} == {"__main__"}
    assert len({*answer["pids"].values(), *answer["again"].values()}) == 4
    assert answer["left"] == 0


def test_ranks_survive_the_zygote_and_their_exit_codes_stay_true(
    assign: Make, drive: Callable[..., Any]
) -> None:
    assignment = assign(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))\n"
        "print('up')\nsignal.pause()"
    )
    answer = drive(
        assignment,
        """
z = zygote()
fork(z)
until_says(0, "up")
os.kill(z.pid, signal.SIGKILL)
until(lambda: z.state is ZygoteState.GONE)
alive = group.alive
refused = z.fork(assignment.path, [0])
group.signal(0, signal.SIGUSR1)
until(lambda: not group.alive)
z.close()
finish(alive=alive, refused=refused, told=told[1:], code=group.exits[0].code, lost=lost)
""",
    )
    assert answer == {
        "alive": [0],
        "refused": None,
        "told": [["zygote_lost", {"reason": "it died by SIGKILL", "module": ""}]],
        "lost": [1],
        "code": 5,
    }


@pytest.mark.parametrize("later", [False, True])
def test_a_module_that_starts_a_thread_makes_it_refuse_naming_the_module(
    assign: Make, drive: Callable[..., Any], later: bool
) -> None:
    assignment = assign("import signal; print('up'); signal.pause()")
    before = "z = zygote(); fork(z); until_says(0, 'up'); z.preload(['yaml', 'starts_a_thread'])"
    answer = drive(
        assignment,
        (before if later else "z = zygote('yaml', 'starts_a_thread', 'wave')")
        + """
until(lambda: z.state is not ZygoteState.BUSY)
finish(state=z.state.name, module=z.unfit_module, told=told[-1], alive=group.alive)
group.stop(0.0)
z.close()
""",
    )
    assert answer["state"] == "GONE"
    assert answer["module"] == "starts_a_thread"
    name, fields = answer["told"]
    assert name == "zygote_lost"
    assert "2 threads after importing starts_a_thread" in fields["reason"]
    assert answer["alive"] == ([0] if later else [])


def test_it_refuses_to_fork_when_it_has_grown_a_thread_since(
    assign: Make, drive: Callable[..., Any]
) -> None:
    assignment = assign("print('up')")
    modules = Path(assignment.directory).parent / "modules"
    modules.mkdir()
    (modules / "late.py").write_text(
        "import signal, threading\n"
        "def grow(*_):\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "signal.signal(signal.SIGUSR1, grow)\n"
    )
    answer = drive(
        assignment,
        """
z = zygote("late")
os.kill(z.pid, signal.SIGUSR1)
while psutil.Process(z.pid).num_threads() < 2:
    pass
forked = fork(z)
finish(forked=forked, state=z.state.name, told=told[-1], module=z.unfit_module)
z.close()
""",
    )
    assert answer["forked"] is None
    assert answer["state"] == "GONE"
    assert answer["told"] == [
        "zygote_lost",
        {"reason": "it cannot fork safely: it has grown to 2 threads", "module": ""},
    ]
    assert answer["module"] is None


def test_when_the_supervisor_dies_so_do_ranks_their_children_and_the_zygote(
    assign: Make, tmp_path: Path
) -> None:
    assignment = assign(
        "import os, signal, subprocess, sys\n"
        "helper = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()'])\n"
        "print('up', helper.pid, flush=True)\n"
        "signal.pause()",
        world_size=2,
    )
    driver = start_driver(
        assignment,
        """
z = zygote()
pids = fork(z)
for rank in pids:
    until_says(rank, "\\n")
finish(pids=[z.pid, *pids.values(), *(int(log(rank).split()[1]) for rank in pids)])
signal.pause()
""",
        tmp_path,
    )
    assert driver.stdout is not None
    pids = json.loads(driver.stdout.readline())["pids"]
    watched = {pid: os.pidfd_open(pid) for pid in pids}
    assert len(watched) == 5
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    for pid, fd in watched.items():
        assert select.select([fd], [], [], PATIENCE)[0], f"{pid} of {pids} is still alive"
        os.close(fd)


def test_when_the_supervisor_dies_after_its_zygote_the_ranks_still_die(
    assign: Make, tmp_path: Path
) -> None:
    driver = start_driver(
        assign("import signal; print('up'); signal.pause()"),
        """
z = zygote()
pids = fork(z)
until_says(0, "up")
os.kill(z.pid, signal.SIGKILL)
until(lambda: z.state is ZygoteState.GONE)
finish(rank=pids[0])
signal.pause()
""",
        tmp_path,
    )
    assert driver.stdout is not None
    rank = os.pidfd_open(json.loads(driver.stdout.readline())["rank"])
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    died = bool(select.select([rank], [], [], PATIENCE)[0])
    if not died:
        signal.pidfd_send_signal(rank, signal.SIGKILL)
    os.close(rank)
    assert died


def test_a_zygote_that_does_not_answer_is_given_up(assign: Make, drive: Callable[..., Any]) -> None:
    answer = drive(
        assign("print('up')"),
        """
import autoglm_resume.supervise.ranks.zygote as module
module.PATIENCE = 0.2
z = zygote()
os.kill(z.pid, signal.SIGSTOP)
forked = fork(z)
finish(forked=forked, state=z.state.name, told=told[-1][0], alive=psutil.pid_exists(z.pid))
""",
    )
    assert answer == {"forked": None, "state": "GONE", "told": "zygote_lost", "alive": False}


TORCH_RANK = """
import os, sys
assert "torch" not in sys.modules
sys.addaudithook(lambda event, of: event == "exec" and print("executed", of[0].co_filename))
import torch, torch._dynamo
loss = torch.nn.Linear(4, 1)(torch.ones(4)).sum()
loss.backward()
print(float(loss))
store = torch.distributed.TCPStore("localhost", int(os.environ["STORE"]), is_master=False)
print(store.add("ranks", 1), file=open(os.environ["RANK"], "w"))
"""


def test_torch_is_imported_once_and_works_in_the_forks(
    assign: Make, drive: Callable[..., Any]
) -> None:
    assignment = assign(TORCH_RANK, world_size=2)
    answer = drive(
        assignment,
        """
z = zygote()
z.open_store(0)
until(lambda: len(stores) == 1)
z.open_store(stores[0].port)  # which is taken: nothing comes of it
assignment = replace(assignment, environment={"STORE": str(stores[0].port)})
assignment.path.write_bytes(assignment.to_json())
until(lambda: z.state is ZygoteState.READY)
fork(z)
until(lambda: not group.alive)
serving = psutil.Process(stores[0].pid)
finish(codes=[how.code for how in group.exits.values()], ready=told[0], logs=[log(0), log(1)],
       stores=len(stores), parent=serving.ppid() == os.getpid())
z.close()
serving.kill()
""",
        torch=True,
    )
    assert answer["codes"] == [0, 0], answer["logs"]
    assert answer["ready"][0] == "zygote_ready"
    assert answer["ready"][1]["skipped"] == []
    assert "packages/torch/" not in answer["logs"][0], "given back, and not imported again"
    assert answer["logs"][0] == answer["logs"][1], "torch starts from its default seed, as cold"
    assert (answer["stores"], answer["parent"]) == (1, True)
    assert {int(Path(assignment.source.workdir, rank).read_text()) for rank in "01"} == {1, 2}


def test_threads_that_a_fork_would_end_by_itself_do_not_stop_a_job_of_one_rank(
    assign: Make, drive: Callable[..., Any]
) -> None:
    """OpenBLAS has a thread per core when NumPy is imported, and OMP_NUM_THREADS is not set."""
    answer = drive(
        assign("import numpy; a = numpy.ones((500, 500)); print((a @ a).sum())"),
        """
from autoglm_resume.protocol.assignment import shared_environment
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.pop(name, None)
environment = {**os.environ, **shared_environment(1)}
z = Zygote(loop, environment, ["numpy"], Path(assignment.directory) / "zygote.log",
           lambda *_, **__: None, lambda: None, stores.append, lambda *_: None)
until(lambda: z.state is not ZygoteState.BUSY)
fork(z)
until(lambda: not group.alive)
finish(state=z.state.name, log=log(0))
z.close()
""",
    )
    assert answer == {"state": "READY", "log": "125000000.0\n"}
