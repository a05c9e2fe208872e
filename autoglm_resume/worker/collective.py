"""One small collective round, as a process per rank: whether ranks would reach each other at all.

Usage: python -m autoglm_resume.worker.collective RANK WORLD_SIZE PORT SECONDS
"""

from __future__ import annotations

import sys
from datetime import timedelta


def main(rank: int, world_size: int, port: int, seconds: float) -> None:
    """Sum the ranks' numbers, and compare. Raises what torch raises."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", rank) if gpus >= world_size else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    total = torch.full((1 << 16,), float(rank), device=device)
    dist.all_reduce(total)
    expected = world_size * (world_size - 1) / 2
    if not bool((total == expected).all()):
        raise SystemExit(f"rank {rank}: expected a sum of {expected}, found {total[0].item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
