"""Without a supervisor: the ranks pass the gate by themselves, and all take what it lets through.

One rank passes it for all where they can talk, through the process group's store or that of
torchrun's agent. Where they cannot, each passes it, one after the other: the first puts away what
is corrupt, and the same files make the others choose alike.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autoglm_resume import events, output
from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.structure import Structure, combined
from autoglm_resume.checkpoint.store.gate import Expectation, Verdict
from autoglm_resume.checkpoint.store.gatekeeper import Gatekeeper, WaysOut
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import NoAcceptableCheckpoint
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.savers import directory_lock
from autoglm_resume.worker import run_beside
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.run_beside import RunBeside

PATIENCE = timedelta(days=1)
"""For rank 0, which may read every byte of a checkpoint, or have it repaired; if it dies, whoever
launched the ranks ends the others."""

_agreements = itertools.count()


@dataclass(frozen=True)
class GateAnswer:
    """What the gate said, for every rank."""

    token: str
    """Tells this launch's checkpoints from those of other launches at the same step."""
    branches: tuple[Branch, ...] = ()
    resume: ResumePoint | None = None
    problem: str = ""
    """Why nothing that is there will do; `hint` says what will."""
    hint: str = ""

    @classmethod
    def decode(cls, data: bytes) -> GateAnswer:
        """What `encode` made of it."""
        found = json.loads(data)
        resume = found.pop("resume")
        branches = tuple(Branch(step, attempt) for step, attempt in found.pop("branches"))
        return cls(
            resume=ResumePoint(**{**resume, "seals": ()}) if resume else None,
            branches=branches,
            **found,
        )

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def agreed(settings: Settings, model: Structure | None) -> Settings:
    """Pass the gate; returns `settings` with what to resume from, the same for all ranks.

    `model` is this rank's. Raises NoAcceptableCheckpoint, in every rank.
    """
    if dist.is_available() and dist.is_initialized():
        # A script that spawns its ranks itself need not set torchrun's variables.
        settings = replace(settings, rank=dist.get_rank(), world_size=dist.get_world_size())
    own = model.hash if model else ""
    store = _common_store() if settings.world_size > 1 else None
    if store is None:
        answer = _pass_gate(settings, own, model, only=settings.world_size == 1)
    elif settings.rank == 0:
        others = [f"model {rank}" for rank in range(1, settings.world_size)]
        if others:
            store.wait(others, PATIENCE)
        hashes = [own, *(store.get(key).decode() for key in others)]
        known = [each for each in hashes if each]
        answer = _pass_gate(settings, combined(known) if known else "", model, only=True)
        store.set("answer", answer.encode())
    else:
        store.set(f"model {settings.rank}", own)
        store.wait(["answer"], PATIENCE)
        answer = GateAnswer.decode(store.get("answer"))
    if answer.problem:
        raise NoAcceptableCheckpoint(answer.problem, hint=answer.hint)
    how = replace(settings.checkpoint, branches=answer.branches)
    return replace(settings, resume=answer.resume, token=answer.token, checkpoint=how)


def _common_store() -> Any | None:
    """What ranks can talk through, under names that only this agreement has; None without."""
    if not dist.is_available():
        return None
    if dist.is_initialized():
        store: Any = dist.distributed_c10d._get_default_store()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    else:
        return None
    # torchrun's store outlives its restarts, and so does an answer in it.
    launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"autoglm gate {launch} {next(_agreements)}"
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _pass_gate(settings: Settings, hash: str, model: Structure | None, *, only: bool) -> GateAnswer:
    """`hash` is that of all ranks' models; `only`: no other rank passes for itself."""
    root = Path(settings.checkpoint.dir)
    run = run_beside.find(root)
    store = Store(root)
    expectation = Expectation(settings.world_size, hash or None, model, branches=run.branches)
    gate = Gatekeeper(store, expectation, _say, _ways_out(root), run.checkpointed)
    if only and run.replicas:  # which might answer one rank, and not the next
        gate.repair_with(lambda id, digest: _repair(store, run, id, digest))
    token = _token(run, only=only)
    try:
        with directory_lock.settled(root):
            accepted = gate.admit()
            if only:
                gate.clean()  # the other ranks wait for this answer, so nothing is being written
    except NoAcceptableCheckpoint as error:
        return GateAnswer(token, problem=error.message, hint=error.hint)
    return GateAnswer(token, run.branches, _point(accepted))


def _point(accepted: Verdict | None) -> ResumePoint | None:
    return ResumePoint(accepted.id, accepted.step, accepted.digest) if accepted else None


def _ways_out(root: Path) -> WaysOut:
    return WaysOut(
        world_size="start as many ranks as made the checkpoints",
        model="go back to the model that made the checkpoints",
        fresh=f"move {root} away to start from step 0",
    )


def _repair(store: Store, run: RunBeside, id: str, digest: str | None) -> list[str]:
    from autoglm_resume.savers import replicator

    request = {"id": id, "digest": digest}
    answer = replicator.answer(store, run.replicas, run.id, request)
    files: list[str] = answer["files"]
    if files:
        output.say(f"{id} was damaged; replaced from a replica: {', '.join(files)}")
    else:
        output.say(f"{id} is damaged, and no replica could repair it: {answer['reason']}")
    return files


def _say(event: events.Event, /) -> None:
    """What a gatekeeper tells, to whoever reads the script's standard error."""
    match event:
        case events.WarningGiven(text=text):
            output.say(text)
        case events.Quarantined(id=id, reason=reason):
            output.say(f"{id} was moved to quarantine, {reason}")
        case events.GatePassed(accepted=str(accepted), step=step):
            passed_over = [verdict for verdict in event.verdicts if not verdict.accepted]
            for verdict in passed_over:
                if not verdict.corrupt:
                    output.say(f"{verdict.id} is left where it is, {verdict.reason}")
            if passed_over:
                output.say(f"going on from step {step}, checkpoint {accepted}")


def _token(run: RunBeside, *, only: bool) -> str:
    """In a run's directory it counts as an attempt after all of the run's own: as of its present
    branch, and newer than what they left at the same step.
    """
    if only:
        # By the time: what this launch saves at the step that it began with is newer than that.
        word = f"{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:4]}"
    else:
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        launch = "/".join(os.environ.get(name, "") for name in names)
        word = uuid.uuid5(uuid.NAMESPACE_OID, launch).hex[:8]
    attempt = max(run.attempts, *(branch.attempt for branch in run.branches), 0)
    return f"a{attempt}x{word}" if run.id else f"x{word}"
