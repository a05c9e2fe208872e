"""A small classifier that uses everything a resumed run can get wrong: what `exactness` trains.

Dropout and noise (the state of three generators), shuffled data from a resumable sampler, AdamW's
moments, a learning rate schedule, two ranks. Before a step counts as done, each rank appends what
it consumed to a file of samples; at the end it writes digests of the weights and the optimizer it
holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLES, WIDTH, CLASSES = 700, 256, 10  # an epoch is 21 steps, the last one larger


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a state dict, in a fixed order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from tensors(state[key])
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)


def sha256(state: Any) -> str:
    """Of the bytes of all tensors."""
    digest = hashlib.sha256()
    for tensor in tensors(state):
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main() -> None:
    """Train."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset

    import autoglm_resume as autoglm

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0, help="seconds after each step")
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    samples = os.open(args.output / "samples.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    data = TensorDataset(inputs, labels, torch.arange(SAMPLES))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank)  # dropout and noise differ by rank; DDP makes the weights rank 0's
    net = nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, CLASSES)
    )
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    sampler = autoglm.ResumableSampler(SAMPLES, 16, endless=True)

    session = autoglm.init()
    session.track(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
    session.resume()

    def held() -> str:
        states = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        return json.dumps({name: sha256(state) for name, state in states.items()})

    (args.output / f"resumed-{attempt}-{rank}.json").write_text(held())
    batches = iter(DataLoader(data, batch_sampler=sampler, generator=torch.Generator()))
    for step in session.steps(args.steps):
        x, y, indices = next(batches)
        x = x * (1 + 0.01 * random.random()) + 0.01 * float(np.random.rand())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        line = {
            "attempt": attempt,
            "rank": rank,
            "step": step,
            "samples": indices.tolist(),
            "loss": loss.item(),
        }
        # The newline in front keeps it apart from a line that a kill cut short.
        os.write(samples, b"\n" + json.dumps(line).encode() + b"\n")
        time.sleep(args.pause)
    (args.output / f"final-{rank}.json").write_text(held())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
