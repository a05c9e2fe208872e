"""A small training whose checkpoints share what they can: what `corruption` damages.

A frozen embedding is the same in all checkpoints but the first, the weights move a little between
two of them, and two ranks hold the same model but generators of their own. Each rank writes down
the digests of what it had in memory at every save, which is the truth that a restore is held
against.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

FROZEN, WIDTH, BATCH = 300, 64, 8  # the embedding has more than one chunk of 1 MiB
PATIENCE = 30
"""Seconds to wait for a checkpoint."""


def digest_of(state: Any) -> str:
    """Of every value in nested dicts, lists and tuples: types, order, and the bytes of tensors."""
    digest = blake3()

    def add(value: Any) -> None:
        digest.update(f"{type(value).__name__}:".encode())
        if isinstance(value, dict):
            for key, member in value.items():
                digest.update(f"{key!r}=".encode())
                add(member)
        elif isinstance(value, (list, tuple)) and not all(type(one) is int for one in value):
            digest.update(f"{len(value)}:".encode())
            for member in value:
                add(member)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif hasattr(value, "tobytes"):
            digest.update(f"{value.dtype}".encode() + value.tobytes())
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def objects() -> dict[str, Any]:
    """Everything that is trained and tracked, as it is before the first step."""
    import autoglm_resume as autoglm

    net = torch.nn.Sequential(
        torch.nn.Embedding(FROZEN, 1024),
        torch.nn.Linear(1024, WIDTH),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(WIDTH, 1),
    )
    net[0].requires_grad_(False)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    return {
        "model": net,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        "sampler": autoglm.ResumableSampler(64, BATCH, endless=True),
    }


def await_commits(store: Any, count: int) -> None:
    """What is not committed yet cannot be referred to by the next checkpoint."""
    deadline = time.monotonic() + PATIENCE
    while len(store.committed()) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"expected {count} checkpoints, found {len(store.committed())}")
        time.sleep(0.002)


def main() -> None:
    """Train, save at every `--every`-th step, and write `truth-<rank>.json` there."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import autoglm_resume as autoglm
    from autoglm_resume.checkpoint.store.store import Store
    from autoglm_resume.worker.base import rng

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--every", type=int, default=2)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # DDP makes the weights rank 0's; the generators stay apart
    tracked = objects()
    model = DistributedDataParallel(tracked["model"])
    optimizer, scheduler = tracked["optimizer"], tracked["scheduler"]

    session = autoglm.init()
    session.track(**{**tracked, "model": model})
    session.resume()
    store = Store(args.output / "run" / "checkpoints")
    truth = {}
    batches = iter(tracked["sampler"])
    for step in range(args.saves * args.every):
        loss = model(torch.tensor(next(batches)) % FROZEN).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step == args.every:
            with torch.no_grad():
                tracked["model"][0].weight.mul_(1.5)  # only now it is frozen
        session.step_done(step)
        if session.step % args.every == 0:
            await_commits(store, len(truth))
            if not session.save():
                raise SystemExit("a save failed")
            states = {name: obj.state_dict() for name, obj in tracked.items()}
            states["rng"] = rng.capture()
            truth[session.step] = {name: digest_of(state) for name, state in states.items()}
    (args.output / f"truth-{rank}.json").write_text(json.dumps(truth))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
