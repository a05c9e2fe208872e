"""A GPT-like decoder of 20 million parameters: what `recovery`, `goodput` and `overhead` train.

The same model, data and step whichever library makes the checkpoints: `torch` (torch.save and
torch.load, as scripts for torchrun do), `lm-resiliency` or `autoglm`. Every mark is a line of JSON
with the time by CLOCK_MONOTONIC, appended to the file of marks by one write.
"""

from __future__ import annotations

import os
import time
from typing import Any

FIRST_LINE = time.monotonic_ns()

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

TORCH = time.monotonic_ns()

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 2048, 512, 6, 8, 32


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        added: Tensor = self.mlp(self.before_mlp(x))
        return x + added


class Decoder(nn.Module):
    """Embeddings, blocks, and the embeddings again."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return F.linear(self.last(self.blocks(x)), self.tokens.weight)


def mark(what: str, now: int | None = None, **more: Any) -> None:
    """Append one line to the file of marks."""
    line = {
        "what": what,
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
        "attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "mono": (time.monotonic_ns() if now is None else now) / 1e9,
        **more,
    }
    os.write(MARKS, json.dumps(line).encode() + b"\n")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on the tokens of this step and rank; returns the loss."""
    generator = torch.Generator().manual_seed(1000 * step + int(os.environ["RANK"]))
    tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


parser = argparse.ArgumentParser()
parser.add_argument("--library", choices=("autoglm", "torch", "lm-resiliency"), required=True)
parser.add_argument("--marks", type=Path, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--every", type=int, default=5, help="steps between checkpoints (not autoglm)")
parser.add_argument("--checkpoint", type=Path, help="file (torch) or directory (lm-resiliency)")
parser.add_argument("--timeout", type=float, help="seconds, of the process group")
parser.add_argument("--heartbeats", action="store_true", help="to NVIDIA's ft_launcher")
args = parser.parse_args()
MARKS = os.open(args.marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def setup() -> tuple[Decoder, torch.optim.Optimizer]:
    """What needs no rank: a warm spare has done it before."""
    torch.manual_seed(0)
    decoder = Decoder()
    return decoder, torch.optim.AdamW(decoder.parameters(), lr=3e-4)


def train(ready: tuple[Decoder, torch.optim.Optimizer]) -> None:
    """All the rest."""
    built = time.monotonic_ns()
    decoder, optimizer = ready
    mark("first line", FIRST_LINE)
    mark("import torch", TORCH)
    mark("model", built, parameters=sum(p.numel() for p in decoder.parameters()))
    limit = timedelta(seconds=args.timeout) if args.timeout else None
    dist.init_process_group("gloo", timeout=limit)
    model = DistributedDataParallel(decoder)
    mark("process group")
    if args.library == "autoglm":
        session = autoglm.init()
        session.track(model=model, optimizer=optimizer)
        session.resume()
        mark("load")
        for step in session.steps(args.steps):
            train_step(model, optimizer, step)
            mark("step", step=step + 1)
    elif args.library == "lm-resiliency":
        with_lm_resiliency(model, optimizer, limit)
    else:
        with_torch_save(model, decoder, optimizer)
    mark("done", digest=digest(decoder))
    dist.destroy_process_group()


def with_torch_save(model: nn.Module, decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
    """Load and save as scripts for torchrun do."""
    beat = heartbeats()
    start = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location="cpu")
        decoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    mark("load")
    for step in range(start, args.steps):
        train_step(model, optimizer, step)
        mark("step", step=step + 1)
        beat()
        if (step + 1) % args.every == 0 and dist.get_rank() == 0:
            began = time.monotonic()
            state = {
                "model": decoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step + 1,
            }
            torch.save(state, args.checkpoint.with_suffix(".new"))
            args.checkpoint.with_suffix(".new").replace(args.checkpoint)
            mark("saved", step=step + 1, blocked=time.monotonic() - began)


def with_lm_resiliency(
    model: nn.Module, optimizer: torch.optim.Optimizer, limit: timedelta | None
) -> None:
    """As its users do; its detection needs NCCL. It saves in a hook of the optimizer."""
    from lm_resiliency import InMemoryCkptConfig, enable_resiliency

    handle = enable_resiliency(
        model,
        optimizer,
        interval=args.every,
        enable_detection=False,
        group=dist.new_group(backend="gloo", timeout=limit),
        checkpoint=InMemoryCkptConfig(disk_folder=str(args.checkpoint), run_id="bench"),
    )
    mark("load")
    for step in range(handle.step_count, args.steps):
        train_step(model, optimizer, step)
        mark("step", step=step + 1)
        # A save is sure to have its copy at the peer only when the next one begins.
        if (step + 1) % args.every == 0 and step + 1 > args.every and dist.get_rank() == 0:
            mark("saved", step=step + 1)
    handle.close()


def heartbeats() -> Callable[[], None]:
    """What tells ft_launcher that this rank lives, as its users call it after every step."""
    if not args.heartbeats:
        return lambda: None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client.send_heartbeat  # type: ignore[no-any-return]


def digest(decoder: Decoder) -> str:
    """Of the weights."""
    found = hashlib.sha256()
    for tensor in decoder.state_dict().values():
        found.update(tensor.numpy().data)
    return found.hexdigest()


if args.library == "autoglm":
    import autoglm_resume as autoglm

    autoglm.launch(setup, train)
else:
    train(setup())
