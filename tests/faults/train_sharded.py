"""A tiny FSDP2 training: parameters that do not divide evenly, and ranks without any of some."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from holding import hold
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autoglm_resume as autoglm

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--epochs", type=Path, help="where to write down the samples of each step")
args = parser.parse_args()

dist.init_process_group("gloo")
session = autoglm.init()
torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.1), torch.nn.Linear(5, 1)
)
mesh = init_device_mesh("cpu", (session.world_size,), mesh_dim_names=("shard",))
fully_shard(net[0], mesh=mesh)
fully_shard(net, mesh=mesh)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
sampler = autoglm.ResumableSampler(200, 4, endless=True)
session.track(model=net, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
data = torch.randn(200, 7, generator=torch.Generator().manual_seed(3))

session.resume()
batches = iter(sampler)
for step in session.steps(args.steps):
    hold(session.rank, step)
    batch = next(batches)
    x = data[batch]
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    for buffer in net.buffers():  # alike on all ranks, so that another number of them can take it
        if buffer.is_floating_point():
            dist.broadcast(buffer, 0)
    session.report(loss=loss)
    if args.epochs:
        line = {"step": step, "rank": session.rank, "samples": batch, "loss": float(loss)}
        fd = os.open(args.epochs, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, json.dumps(line).encode() + b"\n")
        os.close(fd)
    time.sleep(args.pause)
dist.destroy_process_group()
