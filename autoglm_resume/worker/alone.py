"""Without a supervisor: rank 0 passes the gate, and all ranks take what it lets through.

They agree through the process group's store, that of torchrun's agent or, where there is neither,
files beside the checkpoints. For as long as they live they have the directory to themselves, and
what is in it must have been made by the same command: a run is its arguments too.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import os
import sys
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autoglm_resume import errors, events, files, locks, output
from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.format.origin import Origin, differences, edited
from autoglm_resume.checkpoint.format.structure import Structure, combined
from autoglm_resume.checkpoint.store.gate import Expectation, Verdict
from autoglm_resume.checkpoint.store.gatekeeper import Gatekeeper, WaysOut
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import SaveFailed
from autoglm_resume.errors import AutoglmError, RunLocked, UsageError
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.savers import directory_lock
from autoglm_resume.worker import run_beside
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.meeting import InFiles, InStore, Meeting
from autoglm_resume.worker.run_beside import RunBeside

MEETING = ".launch"
"""Below the checkpoints: where ranks agree that have no other place."""

_agreements = itertools.count()
_code = 0
"""Of the process, where Python would say that it went well, or has none that says how it did not.
"""
_trained: dict[str, str] = {}
"""The first session of this process, by its token, that trains with the checkpoints there."""
_refused: AutoglmError | None = None
"""What nobody has caught of ours."""


@dataclass(frozen=True)
class GateAnswer:
    """What the gate said, for every rank."""

    token: str
    """Tells this launch's checkpoints from those of other launches at the same step."""
    run: str = ""
    """What its checkpoints have in common with those it goes on from, and with no others."""
    branches: tuple[Branch, ...] = ()
    resume: ResumePoint | None = None
    others: tuple[str, ...] = ()
    """What of the command that made it is another one now."""
    problem: str = ""
    """Why the ranks may not train; `hint` says what to do."""
    hint: str = ""
    kind: str = ""
    """Class of that error."""

    @classmethod
    def refusing(cls, error: AutoglmError) -> GateAnswer:
        """Every rank is to raise this."""
        return cls("", problem=error.message, hint=error.hint, kind=type(error).__name__)

    @classmethod
    def decode(cls, data: str) -> GateAnswer:
        """What `encode` made of it."""
        found = json.loads(data)
        resume = found.pop("resume")
        branches = tuple(Branch(step, attempt) for step, attempt in found.pop("branches"))
        others = tuple(found.pop("others"))
        return cls(
            resume=ResumePoint(**{**resume, "seals": ()}) if resume else None,
            branches=branches,
            others=others,
            **found,
        )

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def end_badly(code: int = SaveFailed.exit_code) -> None:
    """Nobody shall take this process for one that has its result."""
    global _code
    _code = _code or code


def last_word(kept: int, done: int, *, still: bool) -> None:
    """Say which steps are in no checkpoint, if any are not.

    Where a loop `still` runs though the script is at its end, it was left by `break` while a
    variable held its iterator: the result is nowhere, and the script does not know.
    """
    if kept >= done:
        return
    said = f"steps {kept + 1} to {done} are in no checkpoint"
    if still and getattr(sys, "last_value", None) is None:
        said += ": the loop over session.steps() was left while something held its iterator;"
        said += " session.save() behind the loop saves what it did"
        end_badly()
    output.say(said)


def end_refused(error: AutoglmError) -> None:
    """This is what ends the process, and has been told."""
    global _refused
    _refused = error
    end_badly(error.exit_code)


@atexit.register
def _end() -> None:
    """Registered before a script registers anything, so that it runs behind all of that.

    Python has no way to change the exit code of a script that has come to its end but to end it.
    """
    # Any other exception has a code of its own.
    if _code and getattr(sys, "last_value", None) is _refused:
        output.flush()
        logging.shutdown()
        os._exit(_code)


def agreed(settings: Settings, model: Structure | None) -> Settings:
    """Pass the gate; returns `settings` with what to resume from, the same for all ranks.

    `model` is this rank's. Raises, in every rank, NoAcceptableCheckpoint; RunLocked while others
    train with these checkpoints; UsageError if they are of another command.
    """
    if dist.is_available() and dist.is_initialized():
        # A script that spawns its ranks itself need not set torchrun's variables.
        settings = replace(settings, rank=dist.get_rank(), world_size=dist.get_world_size())
    root = Path(settings.checkpoint.dir)
    own = model.hash if model else ""
    meeting = _meeting(settings, root) if settings.world_size > 1 else None
    if settings.rank == 0:
        answer = _lead(settings, own, model, meeting)
    else:
        assert meeting is not None
        answer = GateAnswer.decode(meeting.ask(own))
        if not answer.problem:
            locks.train_too(root)
    if answer.problem:
        locks.leave(root)
        raise getattr(errors, answer.kind)(answer.problem, hint=answer.hint)
    how = replace(settings.checkpoint, branches=answer.branches)
    origin = replace(settings.origin, run=answer.run)
    return replace(
        settings,
        resume=answer.resume,
        token=answer.token,
        checkpoint=how,
        origin=origin,
        others=answer.others,
    )


def require_place(settings: Settings) -> None:
    """Raise UsageError where no save could be written: the result would be nowhere."""
    root = Path(settings.checkpoint.dir)
    _trained.setdefault(str(root), settings.token)
    try:
        files.prove_writable(root)
    except OSError as error:
        raise UsageError(
            f"{root}: expected a directory that this user can write checkpoints to, found:"
            f" {error.strerror}",
            hint="make room there, or choose another: autoglm.init(checkpoint_dir=…); to look at"
            " what is there, session.resume() alone does not write",
        ) from None


def require_steps(settings: Settings, step: int, total: int) -> None:
    """Raise UsageError where no step is left of `total`, and another command has done them, or
    another session of this process: a loop over seeds would report the first one's result for all.
    """
    others = f"by another command: {'; '.join(settings.others)}" if settings.others else ""
    if _trained.get(str(settings.checkpoint.dir), settings.token) != settings.token:
        others = "by an earlier session of this process"
    if step >= max(total, 1) and others:
        raise UsageError(
            f"nothing to train: {_holds(settings, step, total)}, made {others}",
            hint="give this run a directory of its own: autoglm.init(checkpoint_dir=…); to look at"
            " that one's state, session.resume() loads it",
        )


def say_if_idle(settings: Settings, stepped: bool, step: int, total: int) -> None:
    """At the end of a script that asked for the steps up to `total` and did none, since it had
    `step` already: nobody must think that it has trained.
    """
    if settings.rank == 0 and not stepped and step >= max(total, 1) and total >= 0:
        output.say(
            f"nothing to train: {_holds(settings, step, total)}; another run needs another"
            " autoglm.init(checkpoint_dir=…)"
        )


def _holds(settings: Settings, step: int, total: int) -> str:
    return f"{settings.checkpoint.dir} holds step {step} of {total} already"


def _lead(
    settings: Settings, own: str, model: Structure | None, meeting: Meeting | None
) -> GateAnswer:
    """For rank 0: let nobody else in, hear the others, pass the gate, and tell them."""
    root = Path(settings.checkpoint.dir)
    try:
        _hold(root, settings)
    except RunLocked as error:
        answer = GateAnswer.refusing(error)
        if isinstance(meeting and meeting.board, InFiles):
            meeting = None  # it is the others who may be meeting there
        if meeting is not None:
            meeting.gather(own)
    else:
        hashes = meeting.gather(own) if meeting is not None else [own]
        known = [each for each in hashes if each]
        answer = _pass_gate(settings, combined(known) if known else "", model)
    if meeting is not None:
        meeting.answer(answer.encode())
    return answer


def _hold(root: Path, settings: Settings) -> None:
    try:
        problem = locks.train_first(root, str(settings.origin))
    except OSError as error:  # who only looks needs no lock; see require_place
        problem = f"{error.filename or root}: {error.strerror}"
    if problem:
        output.say(f"{problem}: see to it yourself that nobody else trains with these checkpoints")


def _meeting(settings: Settings, root: Path) -> Meeting:
    store = _common_store()
    board = InFiles(root / MEETING) if store is None else InStore(store)

    def left_out() -> str:
        who = locks.holder(root / locks.CHECKPOINTS)
        if who is None:
            return ""
        return (
            f"{root}: rank {settings.rank} came when the other ranks of its launch had begun, and"
            f" cannot join them; rank 0 is {who}"
        )

    return Meeting(board, settings.rank, settings.world_size, left_out)


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
    name = f"autoglm gate {next(_agreements)}"
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _pass_gate(settings: Settings, hash: str, model: Structure | None) -> GateAnswer:
    """For all ranks, which wait for the answer; `hash` is that of all their models."""
    root = Path(settings.checkpoint.dir)
    run = run_beside.find(root)
    store = Store(root)
    expectation = Expectation(settings.world_size, hash or None, model, branches=run.branches)
    gate = Gatekeeper(store, expectation, _say, _ways_out(root), run.checkpointed)
    if run.replicas:
        gate.repair_with(lambda id, digest: _repair(store, run, id, digest))
    word = f"{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:6]}"
    try:
        with directory_lock.settled(root):
            accepted = gate.admit()
            others = _compare(store, accepted, settings) if accepted is not None else ()
            gate.clean()
    except AutoglmError as error:
        return GateAnswer.refusing(error)
    return GateAnswer(_token(run, word), run.id or word, run.branches, _point(accepted), others)


def _compare(store: Store, accepted: Verdict, settings: Settings) -> tuple[str, ...]:
    """Say what is gone on from; returns what of the command that made it is another one now.

    Raises UsageError if that is anything, unless the script names the directory, which is then its
    user's own: a longer training goes on there.
    """
    manifest = store.load_manifest(store.directory(accepted.id))
    before = manifest.origin
    others: list[str] = []
    if before is not None:
        others = differences(before, settings.origin, remains=_remains(before, settings.origin))
    if others and not settings.named:
        raise UsageError(
            f"{store.root}: expected the command that made {accepted.id}, {before}; found"
            f" {settings.origin}: {'; '.join(others)}",
            hint="give this run a directory of its own, or name this one to go on there:"
            " autoglm.init(checkpoint_dir=…); or start it with the same arguments; or move"
            f" {store.root} away",
        )
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
    said = f"going on from step {accepted.step}, checkpoint {accepted.id}, made {made}"
    if before is not None and before.script:
        said += f" by {before}"
        if others:
            said += f"; with other arguments now: {'; '.join(others)}"
        if edited(before, settings.origin):
            said += "; the script has been edited since"
    output.say(said)
    return tuple(others)


def _remains(before: Origin, now: Origin) -> bool:
    """Whether the script that made a checkpoint is still where it was, and not what runs now."""
    try:
        return not Path(before.script).samefile(now.script)  # which links may lead to
    except OSError:
        return False


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
        case events.GatePassed(accepted=str()):
            for verdict in event.verdicts:
                if not (verdict.accepted or verdict.corrupt):
                    output.say(f"{verdict.id} is left where it is, {verdict.reason}")


def _token(run: RunBeside, word: str) -> str:
    """In a run's directory it counts as an attempt after all of the run's own: as of its present
    branch, and newer than what they left at the same step.

    `word` begins with the time, so that of two launches the later is the newer.
    """
    attempt = max(run.attempts, *(branch.attempt for branch in run.branches), 0)
    return f"a{attempt}x{word}" if run.id else f"x{word}"
