"""What many programs of the zoo have in common."""

from __future__ import annotations

import torch

from .registry import Program


def net(width: int = 16) -> torch.nn.Sequential:
    """With dropout, so that the generator matters."""
    return torch.nn.Sequential(
        torch.nn.Linear(8, width),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(width, 1),
    )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Of a random batch."""
    x = torch.randn(6, 8)
    found: torch.Tensor = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
    return found


def usual(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **more: object) -> Program:
    """A loop as in any tutorial."""

    def step(_: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer, **more}, step)
