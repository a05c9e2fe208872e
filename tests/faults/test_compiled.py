"""What was compiled once is not compiled again after a restart."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.conftest import Rehearsal, finish

COMPILED = """
import os, time
import torch
import autoglm_resume as autoglm
from torch._dynamo.utils import counters

session = autoglm.init()
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
compiled = torch.compile(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
session.track(model=model, optimizer=optimizer)
for step in session.steps(20):
    loss = compiled(torch.randn(4, 16)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("cache hits", counters["inductor"]["fxgraph_cache_hit"], flush=True)
    if step == 10 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_restart_takes_its_kernels_from_the_runs_own_cache(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it where it compiles
    script = rehearsal.directory / "compiled.py"
    script.write_text(COMPILED)
    limits = {"timeout": "5m"}
    process = rehearsal.start(script=str(script), nproc_per_node=1, heartbeat=limits)
    finished = finish(process, 500)
    assert finished.code == 0, finished
    first, second = (
        (rehearsal.run_dir / "attempts" / number / "rank-0.log").read_text()
        for number in ("000", "001")
    )
    assert "cache hits 0" in first
    assert "cache hits 0" not in second
    assert any((rehearsal.run_dir / "cache" / "inductor").iterdir())
