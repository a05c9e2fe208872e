"""A collective round among as many processes as there will be ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from autoglm_resume.supervise.base.machine import free_port

SECONDS = 60.0


def run(ranks: int, environment: Mapping[str, str]) -> tuple[str, float]:
    """(why it failed, empty if it did not; seconds it took)."""
    began = time.monotonic()
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "autoglm_resume.worker.collective"),
                *(str(rank), str(ranks), str(port), str(SECONDS)),
            ],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    errors = []
    try:
        for rank, process in enumerate(processes):
            rest = max(0.1, began + SECONDS - time.monotonic())
            try:
                _, said = process.communicate(timeout=rest)
            except subprocess.TimeoutExpired:
                errors.append(f"rank {rank} did not end within {SECONDS:.0f} s")
                continue
            if process.returncode:
                lines = said.decode(errors="replace").strip().splitlines() or ["no word"]
                errors.append(f"rank {rank} ended with {process.returncode}: {lines[-1][:200]}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return "; ".join(errors), time.monotonic() - began
