#!/usr/bin/env python3
"""Train one program of the zoo, and write down what it came to: train.py NAME DIRECTORY."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import autoglm_resume as autoglm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo import data, loops, optimizers, parallel, registry  # noqa: F401


def sha256(value: Any) -> str:
    """Of values, types and order, tensors in the order of their elements."""
    digest = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, torch.Tensor):
            local = getattr(each, "_local_tensor", each).detach().resolve_conj().contiguous()
            digest.update(f"{each.dtype}{tuple(each.shape)}".encode())
            digest.update(local.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(each, dict):
            for key, item in each.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(each, (list, tuple)):
            for item in each:
                add(item)
        else:
            digest.update(repr(each).encode())

    add(value)
    return digest.hexdigest()


def state_of(value: Any, names: dict[int, str]) -> Any:
    """Of an optimizer by the names of its parameters: their numbers may differ by process."""
    if not isinstance(value, torch.optim.Optimizer):
        return value.state_dict()

    def named(parameters: list[torch.Tensor]) -> list[str]:
        return sorted(names.get(id(parameter), "") for parameter in parameters)

    state = {names.get(id(parameter), ""): state for parameter, state in value.state.items()}
    groups = [
        dict(sorted({**group, "params": named(group["params"])}.items()))
        for group in value.param_groups
    ]
    return [dict(sorted(state.items())), groups]


def main(name: str, directory: Path) -> None:
    """Train; the digests of rank R are in `final-R.json`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    program = registry.ZOO[name].make()
    session = autoglm.init()
    session.track(**program.track)
    rank = os.environ.get("RANK", "0")
    for step in session.steps(program.steps):
        time.sleep(registry.PAUSE)
        seen = program.step(step)
        with (directory / f"seen-{rank}.jsonl").open("a") as lines:
            lines.write(json.dumps([step, repr(seen)]) + "\n")
        if program.stop(step):
            break
    names = {
        id(parameter): f"{key}.{name}"
        for key, value in program.track.items()
        if isinstance(value, torch.nn.Module)
        for name, parameter in value.named_parameters()
    }
    found = {key: sha256(state_of(value, names)) for key, value in program.track.items()}
    found["final"] = sha256(program.final())
    (directory / f"final-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
