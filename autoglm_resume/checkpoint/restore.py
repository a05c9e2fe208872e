"""Disk to state: every chunk is verified in fresh memory before anything is handed out.

Nothing that a model already holds is touched here, so a checkpoint that turns out bad costs
nothing but the time to read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm_resume.checkpoint import tree, verify
from autoglm_resume.checkpoint.part import CHUNK_BYTES, Part
from autoglm_resume.checkpoint.store import Store
from autoglm_resume.errors import CheckpointError, CorruptCheckpoint


@dataclass(frozen=True)
class RestoredPart:
    """`states` maps each object to the state that was given to `snapshot.take`."""

    part: Part
    states: Mapping[str, Any]


def read(
    store: Store,
    path: Path,
    rank: int,
    device: torch.device | str = "cpu",
    *,
    threads: int = 2,
    progress: verify.Progress | None = None,
) -> RestoredPart:
    """Rank `rank`'s state from the checkpoint in `path`, all of it verified, all of it fresh.

    Tensors that were on a device come back on `device`, the others (as generator states) always
    in host memory. Raises CheckpointError naming the file, the tensor, what was expected and
    what was found.
    """
    part = store.load_part(path, rank)
    tensors = _read_tensors(path / part.pack, part, threads, progress)
    states: dict[str, Any] = {}
    for name, state in part.state.items():
        for leaf in tree.device_leaves(state):
            if leaf in tensors:
                tensors[leaf] = tensors[leaf].to(device)
        states[name] = tree.decode(state, tensors)
    if tensors:
        raise CorruptCheckpoint(
            f"{path}: rank {rank}: expected every tensor in a state, found {next(iter(tensors))}"
            " in none"
        )
    return RestoredPart(part, states)


def _read_tensors(
    pack: Path, part: Part, threads: int, progress: verify.Progress | None
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    jobs: list[tuple[int, memoryview, str]] = []
    for entry in part.tensors:
        try:
            tensor = torch.empty(entry.shape, dtype=tree.dtype_named(entry.dtype))
        except RuntimeError as error:
            raise CheckpointError(f"{pack}: {entry.name}: no memory for it: {error}") from error
        tensors[entry.name] = tensor
        view = tree.as_bytes(tensor)
        for place, index in enumerate(entry.chunks):
            start = place * CHUNK_BYTES
            jobs.append((index, view[start : start + part.chunks[index].raw], entry.name))

    with verify.reading(pack):
        fd = os.open(pack, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if (found := os.fstat(fd).st_size) != part.stored:
                raise CorruptCheckpoint(f"{pack}: expected {part.stored} bytes, found {found}")

            def load(job: int, _: memoryview) -> None:
                index, target, name = jobs[job]
                verify.read_chunk(fd, part.chunks[index], target, f"{pack}: {name}")
                if progress:
                    progress(len(target))

            verify.on_threads(len(jobs), load, lambda: memoryview(b""), threads)
        finally:
            os.close(fd)
    return tensors
