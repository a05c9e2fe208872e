"""A tiny but real DDP training that can be told to fail: what the drills supervise."""

import argparse
import atexit
import contextlib
import os
import resource
import signal
import socket
import subprocess
import time

import torch
import torch.distributed as dist
from holding import hold
from torch.nn.parallel import DistributedDataParallel

import autoglm_resume as autoglm

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--pause", type=float, default=0.01)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--every-steps", type=int, default=5)
parser.add_argument("--fail", help="how in attempt 0, in attempt 1, …", default="")
parser.add_argument("--at", type=int, default=12)
parser.add_argument("--code", type=int, default=17, help="of --fail exit")
args = parser.parse_args()

hold(int(os.environ.get("RANK", "0")), 0)
session = autoglm.init(checkpoint_dir="checkpoints", every_steps=args.every_steps)
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
ways = args.fail.split(",")
args.fail = ways[min(attempt, len(ways) - 1)]
args.at += attempt * args.every_steps if len(ways) > 1 else 0  # each after a new checkpoint
failing = attempt < len(ways) and session.rank == session.world_size - 1


class LossDiverged(Exception):
    pass


def say_when() -> None:
    """For those who measure, in the log."""
    print(f"fault at {time.monotonic()}", flush=True)


if args.fail == "steal-port" and attempt == 0 and session.rank == 0:
    say_when()
    thief = socket.socket()
    thief.bind(("", int(os.environ["MASTER_PORT"])))
    thief.listen()
if args.fail == "always":
    raise ValueError("this script never works")
if args.fail == "killed-always":
    os.kill(os.getpid(), signal.SIGKILL)
if args.fail == "ninety-three":
    raise SystemExit(93)
if args.fail == "early" and failing:
    say_when()
    raise ValueError("the configuration is on fire")
if args.fail == "import" and failing:
    say_when()
    import no_such_module  # noqa: F401
if args.fail == "daemon":
    subprocess.Popen(["sleep", "1234.5"], start_new_session=True)


class Broken(torch.utils.data.Dataset[int]):
    """A data set with one bad sample."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise ValueError("sample 5 is broken")
        return index


def cut_connections() -> None:
    """As a network does that fails: both ends see it."""
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        with contextlib.suppress(OSError):
            link = socket.socket(fileno=os.dup(fd))
            with link:
                if link.family in (socket.AF_INET, socket.AF_INET6) and link.getpeername():
                    link.shutdown(socket.SHUT_RDWR)


def grow(limit: int) -> list[bytearray]:
    """Take memory until the kernel's OOM killer comes."""
    held: list[bytearray] = []
    while sum(map(len, held)) < limit:
        held.append(bytearray(64 << 20))
    raise AssertionError("there is no limit here")


if session.world_size > 1:
    dist.init_process_group("gloo")
torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Linear(32, args.width), torch.nn.Dropout(0.1), torch.nn.Linear(args.width, 1)
)
model = DistributedDataParallel(net) if session.world_size > 1 else net
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
sampler = autoglm.ResumableSampler(200, 4, endless=True)
session.track(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
if args.fail == "track-more":
    session.track(another=torch.optim.SGD(net.parameters()))
data = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))


def go_on_failing() -> None:
    """What gets worse with every step."""
    match args.fail:
        case "leak-memory":
            leaked.append(torch.ones(1 << 26))
        case "flood":
            for _ in range(32):
                os.write(1, (b"x" * 1023 + b"\n") * 1024)
        case "leak-workers":
            loader = torch.utils.data.DataLoader(
                range(100), num_workers=2, generator=torch.Generator()
            )
            leaked.append(iter(loader))
            if step == args.at + 5:
                say_when()
                os.kill(os.getpid(), signal.SIGKILL)


leaked = []
batches = None
for step in session.steps(args.steps):
    hold(session.rank, step)
    if args.fail == "at-once" and failing and step == args.at:
        os.kill(os.getpid(), signal.SIGKILL)
    if args.fail == "leak" and step < args.at:
        subprocess.run(["sh", "-c", "sleep 0.05 &"], check=True)  # an orphan that ends
    batches = batches or iter(sampler)
    x = data[next(batches)]
    if args.fail and failing and step == args.at:
        say_when()
    if failing and step >= args.at:
        go_on_failing()
        x = x * float("nan") if args.fail == "nan" else x
    if failing and step == args.at and args.fail == "sleepy-data":
        time.sleep(1000)
    if session.rank == 1 and args.fail == "slow":
        time.sleep(0.1)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    if failing and step == args.at:
        if args.fail == "hold-lock":
            sum(range(10**13))
        if args.fail == "deadlock":
            dist.all_reduce(torch.zeros(3))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    session.report(loss=loss)
    if args.fail == "again" and session.rank == 1 and step == args.at:
        raise ValueError("the same every time")
    if failing and step == args.at:
        match args.fail:
            case "raise":
                raise ValueError("the data is on fire")
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "abort":
                os.abort()
            case "exit":
                raise SystemExit(args.code)
            case "diverge":
                raise LossDiverged("the loss is nan")
            case "thread":
                time.sleep(1000)
            case "loader":
                list(torch.utils.data.DataLoader(Broken(), num_workers=1))
            case "full-disk":
                with open("/dev/full", "w") as full:  # noqa: PTH123
                    full.write("x")
            case "leak":
                resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
                leaked = []
                while True:
                    leaked.append(open(os.devnull))  # noqa: PTH123, SIM115
            case "hog":
                grow(8 << 30)
            case "cut":
                cut_connections()
            case "slow-end":
                atexit.register(time.sleep, 1000)
                cut_connections()
                raise ValueError("the data is on fire")
    time.sleep(args.pause)
if args.fail == "never-end" and failing:
    atexit.register(time.sleep, 1000)
if session.rank == 0:
    print(f"done at step {session.step}", flush=True)
if session.world_size > 1:
    dist.destroy_process_group()
