from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume.protocol.assignment import Assignment, Checkpointing, Source
from autoglm_resume.protocol.heartbeats import Board

Make = Callable[..., Assignment]


@pytest.fixture
def assign(tmp_path: Path) -> Iterator[Make]:
    """`assign(script_text, args=…, world_size=…)`: an assignment with a board, written down."""
    opened: list[tuple[Board, int]] = []

    def make(
        text: str | None = None,
        *,
        args: tuple[str, ...] = (),
        module: str | None = None,
        world_size: int = 1,
        **changes: Any,
    ) -> Assignment:
        directory = tmp_path / f"attempt-{len(opened)}"
        workdir = tmp_path / "work"
        directory.mkdir()
        (workdir / "scripts").mkdir(parents=True, exist_ok=True)
        script = workdir / "scripts" / "train.py"
        if text is not None:
            script.write_text(text)
        board, fd = Board.create(world_size)
        opened.append((board, fd))
        values: dict[str, Any] = {
            "run_id": "run",
            "attempt": 0,
            "world_size": world_size,
            "master_addr": "127.0.0.1",
            "master_port": 29512,
            "agent_store": False,
            "max_restarts": 3,
            "supervisor": os.getpid(),
            "directory": str(directory),
            "board": f"/proc/{os.getpid()}/fd/{fd}",
            "source": Source(None if module else str(script), module, args, str(workdir)),
            "checkpoint": Checkpointing(str(tmp_path / "checkpoints")),
            "resume": None,
            "check_model": True,
            **changes,
        }
        assignment = Assignment(**values)
        assignment.path.write_bytes(assignment.to_json())
        return assignment

    yield make
    for board, fd in opened:
        board.close()
        os.close(fd)
