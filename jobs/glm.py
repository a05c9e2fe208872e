"""A small GLM-style decoder that learns to write Python, one byte at a time.

It trains on the source text of the standard library of the Python that runs it, so there is
nothing to download. It runs under autoglm, under torchrun, and alone:

    autoglm run jobs/quickstart.yaml
    torchrun --nproc-per-node 2 jobs/glm.py
    python jobs/glm.py --steps 50

Three lines make it survive every death: `autoglm.init()`, `session.track(...)`, and the loop over
`session.steps(...)`.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import autoglm_resume as autoglm

BYTES = 256  # the vocabulary


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on the first half of each head, the rest as it is, as GLM does."""
    turned, kept = x.float().chunk(2, dim=-1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned, kept), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal attention in which several query heads share one key and value head."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head)  # GLM has a bias here only
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, angles), rotate(k, angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3 // 32 * 32
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width, heads, kv_heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(width), SwiGLU(width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class GLM(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, kv_heads: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        rotated = width // heads // 2
        frequencies = 10000 ** (-torch.arange(0, rotated, 2) / rotated)
        angles = torch.arange(context)[:, None] * frequencies
        self.register_buffer("angles", angles, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrink = (
                    math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1
                )
                nn.init.normal_(parameter, std=0.02 / shrink)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats per byte."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.angles[: tokens.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def corpus(megabytes: int) -> tuple[Tensor, Tensor]:
    """The standard library's source as bytes: for training, and every 20th file held out."""
    library = sysconfig.get_path("stdlib")
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths: list[Path] = []
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - skipped
        paths += (Path(folder, name) for name in files if name.endswith(".py"))
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    room = megabytes * 2**20
    for n, path in enumerate(sorted(paths)):
        texts[n % 20 == 0].append(path.read_bytes()[:room])
        room -= len(texts[n % 20 == 0][-1])
    if not all(texts):
        raise SystemExit(f"glm.py: no Python source under {library}")
    train, held_out = (torch.frombuffer(bytearray(b"".join(t)), dtype=torch.uint8) for t in texts)
    return train, held_out


def windows(text: Tensor, context: int) -> Tensor:
    """Rows of `context` bytes and the one that follows; a view, not a copy."""
    return text.unfold(0, context + 1, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--context", type=int, default=192, help="bytes per window")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=20, help="steps until the full rate")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between held-out losses")
    parser.add_argument("--megabytes", type=int, default=16, help="read no more source than this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    session = autoglm.init()  # first: from here on a rank that hangs is noticed

    # NCCL wants a GPU for every rank; with fewer all ranks train on the CPU.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu"
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")

    torch.manual_seed(args.seed)
    model = GLM(args.width, args.layers, args.heads, args.kv_heads, args.context).to(device)
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        if step < args.warm_up:
            return (step + 1) / args.warm_up
        done = (step - args.warm_up) / max(1, args.steps - args.warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    train, held_out = (windows(text, args.context) for text in corpus(args.megabytes))
    sampler = autoglm.ResumableSampler(len(train), args.batch, seed=args.seed, endless=True)

    def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.to(device, torch.long)
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            return net(rows[:, :-1], rows[:, 1:])

    @torch.no_grad()
    def held_out_loss() -> float:
        """The mean over the same 64 windows each time, shared out among the ranks."""
        share = held_out[:: max(1, len(held_out) // 64)][:64][rank::world_size]
        model.eval()
        loss = loss_of(model, share)
        model.train()
        if world_size > 1:
            dist.all_reduce(loss)
        return loss.item() / world_size

    session.track(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
    for step, rows in zip(session.steps(args.steps), sampler, strict=False):
        if step % args.eval_every == 0 and (loss := held_out_loss()) and rank == 0:
            print(f"step {step:4d}  held-out loss {loss:.4f}", flush=True)
        loss = loss_of(ddp, train[rows])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        session.report(loss=loss, grad_norm=norm)

    if (loss := held_out_loss()) and rank == 0:
        print(f"step {args.steps:4d}  held-out loss {loss:.4f}", flush=True)
    if world_size > 1:
        # In this order: if DDP goes last it takes the gloo threads down while it holds the GIL that
        # they may be waiting for, and now and then the process never ends (torch 2.13).
        del ddp
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
