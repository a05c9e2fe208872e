"""A GPT that really learns: what `size` stores. The text is Python's own standard library.

One process trains from scratch, then fine-tunes on a part of the library it has not seen: with the
first half of the network frozen, or with low-rank adapters beside a frozen network.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 128, 128


@dataclass(frozen=True)
class Size:
    """Of the network, and sequences per step."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    batch: int = 8


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv: nn.Module = nn.Linear(width, 3 * width)
        self.out: nn.Module = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3 * self.heads, -1))
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        added: Tensor = self.mlp(self.before_mlp(x))
        return x + added


class Gpt(nn.Module):
    """Embeddings, blocks, and a head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.places = nn.Embedding(LENGTH, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.last = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.last(x))
        return logits


class Adapted(nn.Module):
    """A frozen layer, and a product of two small matrices beside it that learns (LoRA)."""

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.layer(x) + x @ self.down.T @ self.up.T
        return added


def text(pattern: str) -> Tensor:
    """The ASCII characters of the library's files that match."""
    library = Path(sysconfig.get_path("stdlib"))
    data = b"".join(file.read_bytes() for file in sorted(library.glob(pattern)))
    characters = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return characters[characters < VOCABULARY]


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Over what learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.95))


class Training:
    """A model, its optimizer and its text."""

    def __init__(self, size: Size, seed: int) -> None:
        torch.manual_seed(seed)
        self.batch = size.batch
        self.model = Gpt(size)
        self.optimizer = adamw(self.model, 3e-4)
        self.text = text("*.py")
        self.completed = 0
        self.loss = float("nan")

    def steps(self, count: int) -> Iterator[int]:
        """Train; yields the number of completed steps after each."""
        for _ in range(count):
            starts = torch.randint(len(self.text) - LENGTH, (self.batch, 1))
            tokens = self.text[starts + torch.arange(LENGTH + 1)].long()
            logits = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.completed += 1
            self.loss = loss.item()
            yield self.completed

    def freeze_half(self) -> None:
        """Fine-tune the last half; the optimizer keeps what it has of the first."""
        self.text = text("asyncio/*.py")
        blocks = self.model.blocks
        for part in (self.model.tokens, self.model.places, *blocks[: len(blocks) // 2]):
            part.requires_grad_(False)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def renew_optimizer(self) -> None:
        """Go on with a new optimizer over only what learns."""
        self.optimizer = adamw(self.model, 1e-4)

    def adapt(self) -> None:
        """Freeze everything, and fine-tune adapters of attention with an optimizer of their own."""
        self.text = text("asyncio/*.py")
        self.model.requires_grad_(False)
        for block in self.model.blocks:
            block.qkv, block.out = Adapted(block.qkv), Adapted(block.out)
        self.optimizer = adamw(self.model, 1e-3)

    def state(self) -> dict[str, Any]:
        """A copy of what a script would save."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        copied: dict[str, Any] = _copied(state)
        return copied

    def mixed_state(self) -> dict[str, Any]:
        """The same weights as mixed precision has them: a model in bfloat16, and the masters that
        it is the cast of with the optimizer."""
        state = self.state()
        masters = state["model"]
        model = {name: tensor.bfloat16() for name, tensor in masters.items()}
        return {"model": model, "optimizer": state["optimizer"], "masters": masters}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(member) for key, member in value.items()}
    return [_copied(member) for member in value] if isinstance(value, list) else value
