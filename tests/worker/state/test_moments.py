"""Moments of an optimizer lie in memory as their parameter does, or as they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.state.test_optimizers import load, save, step


def image_net(order: torch.memory_format) -> dict[str, Any]:
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=order)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), fused=True)}


def lie(objects: dict[str, Any]) -> tuple[int, ...]:
    weight = objects["model"].weight
    strides: tuple[int, ...] = objects["optimizer"].state[weight]["exp_avg"].stride()
    return strides


@pytest.mark.parametrize("older", [True, False])
def test_moments_lie_in_memory_as_their_parameter_does_now(tmp_path: Path, older: bool) -> None:
    last, first = torch.channels_last, torch.contiguous_format
    restored = save(tmp_path, image_net(first if older else last), older=older)
    after = image_net(last)
    load(restored, after)
    assert lie(after) == after["model"].weight.stride() == (27, 1, 9, 3)
    after = image_net(first)
    load(restored, after)
    assert lie(after) == after["model"].weight.stride() == (27, 9, 3, 1)


def test_moments_that_lay_otherwise_than_their_parameter_do_so_again(tmp_path: Path) -> None:
    def turned(objects: dict[str, Any]) -> None:
        step(objects)
        state = objects["optimizer"].state[objects["model"].weight]
        state["exp_avg"] = state["exp_avg"].to(memory_format=torch.channels_last)

    before, after = (image_net(torch.contiguous_format) for _ in range(2))
    load(save(tmp_path, before, turned), after)
    assert lie(after) == (27, 1, 9, 3)
