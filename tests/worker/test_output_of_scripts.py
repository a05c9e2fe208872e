"""A script with a session and no supervisor, whose output has nowhere to go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoglm_resume.checkpoint.store.examine import candidates
from autoglm_resume.checkpoint.store.store import Store
from tests.patience import PATIENCE

SCRIPT = """
import os, sys
import torch
import autoglm_resume as autoglm

torch.set_num_threads(1)
session = autoglm.init(checkpoint_dir="checkpoints", every_steps=1)
session.track(model=torch.nn.Linear(300, 300))
for step in session.steps(3):
    try:
        os.write(2, b"what a C library prints" * 1000)
    except OSError:
        pass
"""


@pytest.mark.parametrize("fate", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_it_saves_what_it_trains_and_exits_0(fate: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {fate}', sys.executable, SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    found = list(candidates(Store(tmp_path / "checkpoints"), deep=True))
    assert found[0].step == 3
    assert all(facts.integrity.ok for facts in found), "nothing was printed into a pack"
