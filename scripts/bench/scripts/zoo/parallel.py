"""Two processes: models that are copied to all of them, or spread over them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .registry import Program, program
from .usual import loss_of, net, usual


def begin() -> int:
    """Join the others, with a generator of one's own; returns the rank."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.manual_seed(10 + rank)
    return rank


@program(ranks=2)
def ddp_batchnorm() -> Program:
    """Statistics of batches, which differ by rank."""
    begin()
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), net())
    model = DistributedDataParallel(inner)
    torch.manual_seed(10 + dist.get_rank())
    return usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@program(ranks=2)
def ddp_accumulation() -> Program:
    """Gradients that only meet at the end of a window of micro-batches."""
    begin()
    torch.manual_seed(0)
    model = DistributedDataParallel(net())
    torch.manual_seed(10 + dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(n: int) -> float:
        if n % 4 == 3:
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()
        with model.no_sync():
            loss = loss_of(model)
            loss.backward()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer}, step, steps=32)


@program(ranks=2)
def fsdp1() -> Program:
    """Flat parameters, whose state dict is gathered from all ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    begin()
    torch.manual_seed(0)
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    torch.manual_seed(10 + dist.get_rank())
    return usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@program(ranks=2, refused="cannot be saved without pickle")
def fsdp1_local() -> Program:
    """The same with a kind of state dict whose tensors only their own rank can read."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    found = fsdp1()
    model = found.track["model"]
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.LOCAL_STATE_DICT)
    return found


@program(ranks=2)
def fsdp2() -> Program:
    """Parameters that are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    begin()
    torch.manual_seed(0)
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.manual_seed(10 + dist.get_rank())
    return usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
