"""A training that ends in the way that its first argument names, on one rank or several."""

import contextlib
import sys

import torch
import torch.distributed as dist
from holding import hold

import autoglm_resume as autoglm

how, width = sys.argv[1], int(sys.argv[2])
session = autoglm.init()
if session.world_size > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(width, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
session.track(model=model, optimizer=optimizer)


def train(step):
    hold(session.rank, step)
    loss = model(torch.randn(4, width)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def loop(total=13):
    for step in session.steps(total):
        train(step)
        if step == 12:
            match how:
                case "break":
                    break
                case "return":
                    return
                case "raise":
                    raise StopAsyncIteration
                case "exit":
                    sys.exit(0)


def loop_of_ones_own():
    total = int(sys.argv[3]) if sys.argv[3:] else 13
    for step in range(session.resume(), total):
        train(step)
        session.step_done(step)


match how:
    case "break" | "return" | "exit":
        loop(20)
    case "raise":
        with contextlib.suppress(StopAsyncIteration):
            loop(20)
    case "own":
        loop_of_ones_own()
        print("save() returned", session.save())
    case "forget":
        loop_of_ones_own()
    case "one rank":
        loop_of_ones_own()
        if session.rank == 0:
            session.save()
    case "epochs":
        for _ in range(3):
            loop(4)
    case "less":
        loop(int(sys.argv[3]))
        if int(sys.argv[3]) == 8:
            sys.exit(3)
if session.world_size > 1:
    dist.destroy_process_group()
