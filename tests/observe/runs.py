"""Journals and run directories made by hand, for tests that need no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoglm_resume import events
from autoglm_resume.events import Event
from autoglm_resume.journal import encode

WALL = 1_700_000_000.0
"""Unix seconds at monotonic 0 of the first boot."""


class Script:
    """Writes a journal: `at` sets the monotonic time, `say` adds an event."""

    def __init__(self, wall: float = WALL) -> None:
        self.wall = wall
        self.now = 0.0
        self.events: list[Event] = []

    def at(self, mono: float) -> Script:
        self.now = mono
        return self

    def say(self, event: str, **fields: Any) -> Script:
        stamped = {"event": event, "time": self.wall + self.now, "mono": self.now}
        self.events.append(events.read({**stamped, **fields}))
        return self

    def both(self, event: str, **fields: Any) -> Script:
        for rank in (0, 1):
            self.say(event, rank=rank, **fields)
        return self

    def life(self, boot: str = "boot-1", resumed: bool = False) -> Script:
        if not resumed:
            self.say("run_started", name="demo", run_id="r1", world_size=2, launcher="warm")
        return self.say("supervisor_started", boot_id=boot, resumed=resumed, pid=1)

    def attempt(self, number: int, step: int = 0, resume: str | None = None) -> Script:
        self.both("rank_started", pid=1, attempt=number)
        self.say("attempt_started", attempt=number, step=step, resume=resume)
        return self.both("model", attempt=number, hash="h", model=None)

    def save(self, attempt: int, step: int, took: float = 0.1) -> Script:
        """Both ranks save the present moment's step."""
        began, id = self.now, f"step-{step:010d}.a{attempt}"
        self.now += took
        saved = {"attempt": attempt, "id": id, "step": step, "began": began}
        self.both("saved", seconds=took, blocked=took, **saved)
        return self.say(
            "committed", rank=0, objects={"rng": "blake3:r", "model": "blake3:m"}, **saved
        )

    def fails(self, attempt: int, step: int, rank: int = 1, **fields: Any) -> Script:
        summary = f"rank {rank} died by SIGKILL at step {step}, in backward"
        failure = {"kind": "killed", "root_rank": rank, "summary": summary, "step": step}
        return self.say("failure", attempt=attempt, **{**failure, **fields})

    def gate(
        self, accepted: int | None, rejected: tuple[int, ...] = (), attempt: int = 0
    ) -> Script:
        verdicts = [verdict(step, False) for step in rejected]
        if accepted is not None:
            verdicts.append(verdict(accepted, True))
        id = None if accepted is None else f"step-{accepted:010d}.a0"
        return self.say(
            "gate",
            verdicts=verdicts,
            accepted=id,
            step=accepted or 0,
            seconds=0.01,
            attempt=attempt,
        )


def verdict(step: int, good: bool) -> dict[str, Any]:
    detail = "" if good else "rank-00001.pack: chunk 3: expected blake3:aa, found blake3:bb"
    integrity = {"name": "integrity", "ok": good, "expected": "x", "found": "y", "detail": detail}
    world = {"name": "world size", "ok": True, "expected": "2", "found": "2", "detail": ""}
    id = f"step-{step:010d}.a0"
    return {"id": id, "step": step, "accepted": good, "checks": [integrity, world]}


def killed_once() -> Script:
    """Ten steps of 1 s, a save each 4 (0.1 s), killed at step 6, back from 4, finished."""
    run = Script().at(10).life().gate(None)
    run.at(12).attempt(0)
    run.at(13).both("first_step", attempt=0, step=1)
    run.at(16).save(0, 4)
    run.at(18.5).say("drill", attempt=0, spec="kill:rank=1,step=6", kind="kill", rank=1, step=6)
    run.at(18.54).fails(0, 6)
    run.at(18.60).say("group_stopped", attempt=0, seconds=0.06)
    run.say("attempt_ended", attempt=0, outcome="failed", step=6, last_step_mono=18.1)
    run.say("decision", attempt=0, action="restart", delay=0.0, reason="it had made progress")
    run.at(18.62).gate(4)
    run.at(18.7).attempt(1, 4, "step-0000000004.a0")
    run.at(19.2).both("restored", attempt=1, step=4, seconds=0.2)
    run.at(20.2).both("first_step", attempt=1, step=5)
    run.at(23.2).save(1, 8)
    run.at(25.3).save(1, 10)
    run.both("finished", attempt=1, step=10)
    run.at(25.5).say("attempt_ended", attempt=1, outcome="completed", step=10, last_step_mono=25.3)
    return run.say("run_completed", step=10, objects={"rng": "blake3:r", "model": "blake3:f"})


def directory(path: Path, told: list[Event], **job: Any) -> Path:
    """A run directory with this journal."""
    path.mkdir(parents=True, exist_ok=True)
    document = {"name": path.name, "checkpoint": {"dir": str(path / "checkpoints")}, **job}
    (path / "job.json").write_text(json.dumps(document))
    (path / "events.jsonl").write_bytes(b"".join(map(encode, told)))
    return path


def checkpoint(
    root: Path,
    step: int,
    *,
    token: str = "a0",
    lineage: tuple[str, ...] = (),
    refer: bool = False,
    ranks: int = 2,
    **identity: Any,
) -> Path:
    """A real checkpoint; its directory. `refer`: it takes what is the same from its parent."""
    import torch

    from autoglm_resume.checkpoint.format.ids import checkpoint_id
    from autoglm_resume.checkpoint.state import capture
    from autoglm_resume.checkpoint.store.store import Store
    from autoglm_resume.checkpoint.write.part_writer import PartWriter
    from autoglm_resume.checkpoint.write.reuse import PreviousPart

    store = Store(root)
    id = checkpoint_id(step, token)
    weight = torch.full((8, 8), float(step))
    model = {"weight": weight, "bias": torch.zeros(8)}
    state = {"model": model, "optimizer": {"lr": 0.1}}
    for rank in range(ranks):
        taken = capture.take(
            state,
            id=id,
            rank=rank,
            world_size=ranks,
            lineage=lineage,
            model=capture.structure_of(model),
            rng=False,
            **identity,
        )
        saver = PartWriter(store, share=False)
        if refer:
            saver.follow(PreviousPart(store.load_part(root / lineage[0], rank)))
        saver.persist(taken)
    return root / id


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
