"""A GPT of 42 million parameters that saves now and then: what `save` trains, and `load` loads.

In fp32 with AdamW that is 504 MB of state. One process, one thread, one contender of contenders.py.
What every step took, and how long the contender held it up, is written as JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.contenders import CONTENDERS, Autoglm

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 8192, 512, 12, 8, 64
CALM = 4
"""Undisturbed steps there are between two saves, at least."""


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


class Gpt(nn.Module):
    """Embeddings, blocks, and the embeddings again."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        return F.linear(self.last(self.blocks(x)), self.tokens.weight)


def state_bytes(layers: int) -> int:
    """Of the parameters and AdamW's two moments."""
    return 3 * sum(p.nbytes for p in Gpt(layers).parameters())


class Training:
    """The model, its optimizer, and one step of them."""

    def __init__(self, layers: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Gpt(layers)
        # Small, so that it learns the distribution of the tokens and the state looks trained.
        nn.init.normal_(self.model.tokens.weight, std=0.02)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True
        )
        self.completed = 0

    def gradients(self) -> None:
        """Forward and backward."""
        # Zipf-like frequencies: a uniform draw would leave nothing to learn.
        tokens = (VOCABULARY ** torch.rand(1, LENGTH + 1)).long() - 1
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> None:
        """The rest of the step."""
        self.optimizer.step()
        self.completed += 1


def train(training: Training, saver: Any, saves: int, every: int) -> list[dict[str, Any]]:
    """Figures of all steps: `every` of them, and after each save as many, or more.

    A save is followed by the next when it has been on the disk for CALM steps.
    """
    found = []
    for number in range(saves + 1):
        if number:
            found.append(one_step(training, saver, save=True))
        since = calm = 0
        while since < every or calm < CALM:
            found.append(one_step(training, saver))
            since, calm = since + 1, calm + 1 if found[-1]["done"] else 0
    return found


def one_step(training: Training, saver: Any, save: bool = False) -> dict[str, Any]:
    """What it took.

    Seconds of all, on the processor, of the optimizer with what waits in front of it, and blocked:
    in the contender's own calls.
    """
    on_processor = time.thread_time()
    began = time.perf_counter()
    training.gradients()
    differentiated = time.perf_counter()
    saver.fence()
    fenced = time.perf_counter()
    training.update()
    updated = time.perf_counter()
    saver.step_done(training.completed, save)
    ended = time.perf_counter()
    on_processor = time.thread_time() - on_processor
    done = saver.finished()
    if done:
        saver.tidy()
    return {
        "save": save,
        "seconds": ended - began,
        "processor": on_processor,
        "update": updated - differentiated,
        "blocked": ended - updated + fenced - differentiated,
        "done": done,
    }


def commits(training: Training, saver: Autoglm, times: int) -> list[dict[str, float]]:
    """How long saves take from the complete snapshot to the manifest while nothing is trained.

    Each is followed by a plain write and flush of the very bytes it stored.
    """
    found = []
    taken = 0.0

    def snapshot_taken(*_: object) -> None:
        nonlocal taken
        taken = time.perf_counter()

    # Called after the hook in which autoglm waits for its copy: that one is of all optimizers.
    hook = training.optimizer.register_step_pre_hook(snapshot_taken)
    for _ in range(times):
        training.gradients()
        training.update()
        began = time.perf_counter()
        saver.step_done(training.completed, save=True)
        called = time.perf_counter()
        training.optimizer.step()
        own = 0
        while not saver.finished():
            own = max(own, saver.memory()["own"])
            time.sleep(0.005)
        ended = time.perf_counter()
        checkpoint = saver.committed()
        assert checkpoint is not None
        stored = b"".join(file.read_bytes() for file in checkpoint.iterdir())
        found.append(
            {
                "call": called - began,
                "copy": taken - called,
                "seconds": ended - taken,
                "stored": len(stored),
                "own": own,
                "shared": saver.memory()["shared"],
                "plain": plain_write(checkpoint.parent.with_name("plain"), stored),
            }
        )
    hook.remove()
    return found


def plain_write(path: Path, data: bytes) -> float:
    """Seconds to write and flush a new file."""
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took


def await_finished(saver: Any) -> None:
    """Return when its newest checkpoint is there."""
    while not saver.finished():
        time.sleep(0.001)


def main() -> None:
    """Train, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="of its checkpoints")
    parser.add_argument("--figures", type=Path, required=True, help="file to write")
    parser.add_argument("--every", type=int, required=True, help="steps after each save, or more")
    parser.add_argument("--saves", type=int, required=True, help="after a first one to warm up")
    parser.add_argument("--commits", type=int, default=0, help="saves while it does not train")
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    training = Training(args.layers)
    saver = CONTENDERS[args.contender](training, args.directory)
    # The first save starts processes and makes room for copies.
    train(training, saver, 1, CALM)
    figures: dict[str, Any] = {"steps": train(training, saver, args.saves, args.every)}
    if args.commits:
        figures["commits"] = commits(training, saver, args.commits)
    saver.close()
    args.figures.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
