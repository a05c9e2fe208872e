"""A store of checkpoints that a small real training made, and what becomes of damages to it.

Every damage is judged three ways, on files as a restart would find them: each checkpoint is loaded
without asking any gate, it is examined deeply, and the supervisor's gate picks one, trusting what
stat says as it does. And a disk may rot after the gate has looked: then a live session must refuse
the checkpoint with all its tensors untouched, and the gate must take an older one. What was in
memory at each save is the truth that everything is held against.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from lib import common
from lib.damage import Damage, view

RANKS = 2

DETECTED, IDENTICAL = "detected", "identical"
"""Good outcomes: not loadable and known to be, or every byte that loads is as it was saved."""
SILENT, MISSED, LOST = "silently wrong", "missed by the gate", "lost a good one"
OVERWRITTEN, CRASHED = "overwritten", "crashed"


@dataclass(frozen=True)
class Outcome:
    """What became of a damage; `problem` says what was wrong, or how it was detected."""

    kind: str
    problem: str = ""
    fallback: str | None = None
    """Id of the checkpoint that the gate took."""

    @property
    def ok(self) -> bool:
        return self.kind in (DETECTED, IDENTICAL)


class Failure(Exception):
    """A bad outcome; the arguments are those of `Outcome`."""


def train(directory: Path, saves: int, keyframe_every: int = 8) -> None:
    """A run under autoglm in `directory`, which saves so often; see `checkpoints`.

    Raises RuntimeError with its output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = {
        "name": "damaged",
        "script": str(common.SCRIPTS / "train_deltas.py"),
        "args": [f"--output={directory}", f"--saves={saves}"],
        "nproc_per_node": RANKS,
        "run_dir": str(directory / "run"),
        "checkpoint": {
            "every": {"steps": 1_000_000},  # the script itself says when
            "keep": 1000,
            "compress": "small",
            "keyframe_every": keyframe_every,
        },
    }
    (directory / "job.yaml").write_text(json.dumps(job))
    command = [sys.executable, "-m", "autoglm_resume.cli", "run", "job.yaml"]
    done = subprocess.run(
        command,
        cwd=directory,
        env=common.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the training ended with exit code {done.returncode}\n{done.stdout}")


def checkpoints(directory: Path) -> Path:
    """Where a training in `directory` has its checkpoints."""
    return directory / "run" / "checkpoints"


class Trial:
    """Damages to views of the checkpoints of a training in `trained`, in the directory `place`."""

    def __init__(self, trained: Path, place: Path) -> None:
        from autoglm_resume.checkpoint.store.store import Store

        self.pristine = checkpoints(trained)
        self.directory = place
        self.store = Store(place / "checkpoints")
        self.job = job_of(place)
        self._board: Any = None
        self._undamaged = store = Store(self.pristine)
        manifests = [store.load_manifest(path) for path in store.committed()]
        self.ids = [manifest.id for manifest in manifests]
        """Newest first."""
        self.needs = {manifest.id: {manifest.id, *manifest.needs} for manifest in manifests}
        self.truth = [
            json.loads((trained / f"truth-{rank}.json").read_text()) for rank in range(RANKS)
        ]

    def newest_needs(self) -> set[str]:
        """Relative paths of the files that loading the newest checkpoint takes."""
        store = self._undamaged
        newest = store.directory(self.ids[0])
        needed = {f"{newest.name}/{path.name}" for path in newest.iterdir()}
        for rank in range(RANKS):
            part = store.load_part(newest, rank)
            needed |= {f"{pack.id}/{part.pack}" for pack in part.packs}
        return needed

    def fresh(self) -> None:
        """Make the view as good as new."""
        self.directory.mkdir(parents=True, exist_ok=True)
        view(self.pristine, self.store.root)

    def judge(self, damage: Damage) -> Outcome | None:
        """Damage a fresh view, and look what becomes of it; None if the damage changes nothing."""
        self.fresh()
        if not damage.apply(self.store.root):
            return None
        try:
            return self._judge({Path(file).parent.name for file in damage.touched})
        except Failure as failure:
            return Outcome(*failure.args)

    def _judge(self, touched: set[str]) -> Outcome:
        from autoglm_resume.checkpoint.store.examine import examine

        intact: dict[str, bool] = {}
        problem = ""
        for id in self.ids:
            # The others are what they were, and only need to be recognised.
            concerned = not touched.isdisjoint(self.needs[id])
            intact[id] = not concerned or self.loads(id) == ""
            asked = partial(examine, self.store, self.store.root / id, deep=concerned)
            facts = self.guarded(asked)
            if facts.integrity.ok and not intact[id]:
                raise Failure(MISSED, f"{id}: examined as good, and cannot be loaded")
            if not facts.integrity.ok and intact[id] and id not in touched:
                raise Failure(LOST, f"{id} is whole: {facts.integrity.problem}")
            problem = problem or facts.integrity.problem
            if intact[id] and touched.issubset(intact):
                break
        return self._pass_gate(intact, touched, problem)

    def _pass_gate(self, intact: dict[str, bool], touched: set[str], problem: str) -> Outcome:
        from autoglm_resume.supervise.core.history import History
        from autoglm_resume.supervise.gate import RunGate

        gate = RunGate(self.job, RANKS, lambda event, **fields: None, History())
        good = [id for id in self.ids if intact.get(id, True) and id not in touched]
        taken = self._fallback(gate, good)
        return Outcome(DETECTED if problem else IDENTICAL, problem, taken)

    def _fallback(self, gate: Any, good: list[str]) -> str | None:
        """Id of what the gate takes: it must load, and not be older than any of `good` that loads.

        What was touched itself it may take or leave: a lost manifest is made again of the parts.
        """
        from autoglm_resume.errors import NoAcceptableCheckpoint

        try:
            taken = self.guarded(gate.pass_gate, NoAcceptableCheckpoint).id
        except NoAcceptableCheckpoint:
            taken = None
        if taken is not None and (reason := self.loads(taken)):
            raise Failure(MISSED, f"the gate took {taken}: {reason}", taken)
        newer = self.ids[: self.ids.index(taken)] if taken else self.ids
        for id in newer:
            if id in good and not self.loads(id):
                raise Failure(LOST, f"{id} is whole, the gate took {taken}", taken)
        return taken

    def loads(self, id: str) -> str:
        """Why checkpoint `id` does not load, nothing if it does, bit by bit.

        Raises Failure if it loads as something else.
        """
        from autoglm_resume.checkpoint.state import restore
        from autoglm_resume.errors import CheckpointError
        from scripts.train_deltas import digest_of

        step = str(int(id.split(".")[0].removeprefix("step-")))
        reason = ""
        for rank in range(RANKS):
            try:
                read = partial(restore.read, self.store, self.store.root / id, rank)
                found = self.guarded(read, CheckpointError)
            except CheckpointError as error:
                reason = reason or error.message
                continue
            digests = {name: digest_of(state) for name, state in found.states.items()}
            expected = self.truth[rank][step]
            if digests != expected:
                wrong = [name for name in expected if digests.get(name) != expected[name]]
                raise Failure(SILENT, f"{id}: rank {rank} loaded another {', '.join(wrong)}")
        return reason

    def rot(self, damage: Damage, rank: int) -> Outcome | None:
        """Damage the files between the gate's look and a live session's `resume` in `rank`.

        None if that changes nothing of what the rank needs.
        """
        from autoglm_resume.supervise.core.history import History
        from autoglm_resume.supervise.gate import RunGate

        self.fresh()
        gate = RunGate(self.job, RANKS, lambda event, **fields: None, History())
        point = gate.pass_gate()
        damage.apply(self.store.root)
        try:
            reason = self._resume_live(point, rank)
            if not reason:
                return None
            gate.refuse(point.id, reason)
            return Outcome(DETECTED, reason, self._fallback(gate, self.ids[1:]))
        except Failure as failure:
            return Outcome(*failure.args)

    def _resume_live(self, point: Any, rank: int) -> str:
        """Why a session that trains already will not load `point`; nothing if it has."""
        import torch

        from autoglm_resume.errors import CheckpointError
        from autoglm_resume.worker.base.settings import supervised
        from autoglm_resume.worker.session import Session
        from scripts.train_deltas import digest_of, objects

        torch.manual_seed(5)
        live = objects()
        live["model"](torch.arange(8)).sum().backward()
        live["optimizer"].step()
        assignment = self._assignment(point)
        with mock.patch.dict(os.environ, RANK=str(rank)):
            session = Session(supervised(assignment), assignment)
        session.track(**live)
        before = {name: digest_of(obj.state_dict()) for name, obj in live.items()}
        try:
            self.guarded(session.resume, CheckpointError)
        except CheckpointError as error:
            after = {name: digest_of(obj.state_dict()) for name, obj in live.items()}
            if after != before:
                raise Failure(OVERWRITTEN, error.message) from error
            return error.message
        loaded = {name: digest_of(obj.state_dict()) for name, obj in live.items()}
        truth = self.truth[rank][str(point.step)]
        if loaded != {name: truth[name] for name in loaded}:
            raise Failure(SILENT, f"{point.id}: rank {rank} resumed from something else")
        return ""

    def _assignment(self, point: Any) -> Any:
        from autoglm_resume.protocol.assignment import Assignment, Checkpointing, Source
        from autoglm_resume.protocol.heartbeats import Board

        if self._board is None:
            self._board = Board.create(RANKS)
        return Assignment(
            run_id="damaged",
            attempt=1,
            world_size=RANKS,
            master_addr="127.0.0.1",
            master_port=1,
            agent_store=False,
            max_restarts=0,
            supervisor=os.getpid(),
            directory=str(self.directory),
            board=f"/proc/{os.getpid()}/fd/{self._board[1]}",
            source=Source(str(common.SCRIPTS / "train_deltas.py"), None, (), str(self.directory)),
            checkpoint=Checkpointing(dir=str(self.store.root), memory=0),
            resume=point,
            check_model=True,
        )

    @staticmethod
    def guarded(work: Callable[[], Any], *allowed: type[Exception]) -> Any:
        """`work()`. Raises Failure for any exception that is not allowed."""
        try:
            return work()
        except allowed:
            raise
        except Exception as error:
            raise Failure(CRASHED, f"{type(error).__name__}: {error}") from error


def job_of(directory: Path) -> Any:
    """A job whose checkpoints are those in `directory`."""
    from autoglm_resume.job.spec import Job

    return Job.model_validate(
        {
            "name": "damaged",
            "script": str(common.SCRIPTS / "train_deltas.py"),
            "workdir": str(directory),
            "run_dir": str(directory),
            "checkpoint": {"dir": str(directory / "checkpoints")},
        }
    )
