"""The supervisor: gate, launch, watch, conclude, decide, and again; everything into the journal."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autoglm_resume
from autoglm_resume import linux
from autoglm_resume.checkpoint.format.ids import attempt_of
from autoglm_resume.checkpoint.format.structure import Structure
from autoglm_resume.cluster import slurm
from autoglm_resume.errors import (
    AutoglmError,
    CorruptCheckpoint,
    Interrupted,
    NoAcceptableCheckpoint,
    died_by_signal,
)
from autoglm_resume.job.spec import Job, shown
from autoglm_resume.journal import Event, Journal, stamped
from autoglm_resume.protocol.assignment import ResumePoint
from autoglm_resume.supervise.attempt import Attempt, Outcome, hurried
from autoglm_resume.supervise.base.assign import assignment, environment, source, world_size
from autoglm_resume.supervise.base.event_loop import EventLoop, Signals
from autoglm_resume.supervise.base.gpu_exclusion import excluding
from autoglm_resume.supervise.base.run_directory import Lock, RunDirectory
from autoglm_resume.supervise.core import history, policy
from autoglm_resume.supervise.core.diagnosis import Failure, Previous
from autoglm_resume.supervise.core.drill import Drill
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.supervise.persistence import Persistence
from autoglm_resume.supervise.preflight.preflight import Preflight
from autoglm_resume.supervise.ranks.fault_injector import FaultInjector
from autoglm_resume.supervise.ranks.group import end_orphans
from autoglm_resume.supervise.ranks.launcher import Launcher, StartUp, made_for
from autoglm_resume.supervise.recovery import Answering
from autoglm_resume.supervise.save_timer import SaveTimer
from autoglm_resume.supervise.services.notifier import Notifier
from autoglm_resume.supervise.services.replicator import restore
from autoglm_resume.supervise.time_limit import TimeLimit

if TYPE_CHECKING:  # a presenter is handed in; this layer does not depend on it
    from autoglm_resume.observe.live import Screen

SAVE = signal.SIGRTMIN
"""Asks for a checkpoint, and to go on."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """One life of a run's supervisor."""

    def __init__(
        self,
        run: RunDirectory,
        lock: Lock,
        job: Job,
        drills: Sequence[Drill],
        screen: Screen,
        branch_from: int | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """`branch_from` is the step to go back to, leaving newer checkpoints behind; a `fresh` run
        takes nothing from replicas.
        """
        self._fresh = fresh
        self._run = run
        self._lock = lock
        self._job = job
        self._screen = screen
        self._past = history.recall(run.events())
        self._run_id = self._past.run_id or uuid.uuid4().hex[:12]
        self._previous: Failure | Previous | None = self._past.previous
        self._reported = dict(self._past.models)
        self._silences = self._past.silences
        self._objects = self._past.objects or {}
        self._objects_step = self._past.checkpointed
        self._stops: list[signal.Signals] = []
        self._limit: TimeLimit | None = None
        self._launcher: Launcher | None = None
        self._keepers: Persistence | None = None
        self._resume: ResumePoint | None = None
        """What the present attempt began with."""
        self._now: Attempt | None = None
        self._journal = Journal(run.journal)
        self._loop = EventLoop()
        self._ready = Preflight(run, job, self._tell)
        self._notifier = Notifier(self._loop, job, environment(job), run.path, self._tell)
        self._world_size = world_size(job)
        self._gate = RunGate(job, self._world_size, self._tell_next, self._past)
        # A power cut may have lost the journal's last lines, but two attempts must never share a
        # number: it tells their checkpoints of the same step apart.
        self._number = max(self._past.attempts, self._gate.store.next_attempt(), run.next_attempt())
        self._branch_from = branch_from
        self._answers = Answering(job, self._past, self._loop, self._stops, self._tell)
        self._pacing = SaveTimer(
            job, self._past.trained, lambda: self._answers.failures, self._tell
        )
        self._rehearsal = FaultInjector(self._loop, drills, self._gate.store, self._tell)
        self._drills = drills

    def run(self) -> int | None:
        """Bring the run to its end and return the exit code; None if it is to go on in another
        life, without what the journal says is excluded.

        Raises NoAcceptableCheckpoint, and UsageError for what the start of an attempt needs.
        """
        linux.adopt_orphans()
        signals = Signals(self._loop, (*STOPS, SAVE), self._signalled)
        began = time.monotonic()
        code: int | None = AutoglmError.exit_code
        try:
            self._bring_back()
            self._gate.read_ahead()
            self._notifier.start(self._run_id)
            self._introduce()
            self._ready.begin()
            self._limit = self._time_limit()
            self._pacing.choose()
            self._keepers = keepers = Persistence(
                self._loop,
                self._job,
                self._run.path,
                self._run_id,
                self._world_size,
                self._gate,
                self._past,
                self._stops,
                self._tell,
                self._saver_said,
            )
            self._launcher = launcher = made_for(
                self._job,
                source(self._job),
                environment(self._job),
                self._loop,
                self._past.imports,
                self._run.path / "zygote.log",
                self._tell,
                self._helpers,
            )
            code = self._bring_to_end(launcher, keepers, began)
            return code
        except AutoglmError as error:
            ended = "run_interrupted" if isinstance(error, Interrupted) else "run_failed"
            self._tell(ended, code=error.exit_code, reason=error.message)
            raise
        except OSError as error:
            reason = f"{error.filename or self._run.path}: {error.strerror}"
            self._tell("run_failed", code=AutoglmError.exit_code, reason=reason)
            raise AutoglmError(
                reason, hint="autoglm resume continues when that is mended"
            ) from error
        finally:
            if self._limit is not None:
                self._limit.close()
            if self._launcher is not None:
                self._launcher.close()
            if self._keepers is not None:
                self._keepers.close(settled=self._answers.in_trouble)
            self._notifier.close(lambda: hurried(self._stops))
            end_orphans(frozenset())
            if code is None:
                signals.hand_over(self._stops)
            else:
                signals.close()
            self._journal.close()
            self._loop.close()

    def _bring_to_end(self, launcher: Launcher, keepers: Persistence, began: float) -> int | None:
        unfinished = self._answers.unfinished()
        if unfinished is not None and not self._carried_out(unfinished, keepers):
            return None
        given_up = self._answers.wait_on()
        while given_up is None:
            if self._stops:
                return self._interrupted(keepers)
            # No rank is alive here, so this is the moment to judge and to clean up.
            resume = self._gate.pass_gate(keepers.settle(self._gate.may_take_from_memory))
            if self._stops:
                return self._interrupted(keepers)
            outcome = self._attempt(launcher, keepers, resume)
            self._gate.reached(outcome.checkpointed)
            if outcome.completed:
                keepers.settle()
                keepers.flush()
                self._tell(
                    "run_completed",
                    step=outcome.step,
                    objects=self._objects,
                    seconds=time.monotonic() - began,
                )
                return 0
            if self._stops or outcome.failure is None:
                return self._interrupted(keepers)
            self._previous = outcome.failure
            step = resume.step if resume else 0
            decision = self._answers.answer(step, outcome, self._gate.checkpointed)
            if isinstance(decision, policy.Requeue):
                return self._interrupted(keepers, decision.reason)
            if not self._carried_out(decision, keepers):
                return None
            given_up = self._answers.wait(decision)
        keepers.settle()
        self._tell("run_failed", code=given_up.code, reason=given_up.reason)
        return given_up.code

    def _carried_out(self, decision: policy.Decision, keepers: Persistence) -> bool:
        """Whether this life can go on, once `decision` has been told."""
        if isinstance(decision, policy.Smaller):
            self._tell("excluded", **asdict(excluding(self._job, decision.rank)))
            return False
        if isinstance(decision, policy.RollBack):
            keepers.settle()
            self._gate.go_back(decision.before, self._number)
            self._objects_step = min(self._objects_step, self._gate.checkpointed)
            keepers.protect()
        return True

    def _attempt(
        self, launcher: Launcher, keepers: Persistence, resume: ResumePoint | None
    ) -> Outcome:
        self._resume = resume
        self._ready.before(self._gate.store, resume)
        number, self._number = self._number, self._number + 1
        self._run.attempt(number).mkdir(parents=True, exist_ok=True)
        fixed = self._job.env.get("MASTER_PORT")
        endpoint = launcher.rendezvous(int(fixed) if fixed else None, lambda: bool(self._stops))
        attempt = Attempt(
            loop=self._loop,
            job=self._job,
            world_size=self._world_size,
            tell=self._tell,
            screen=self._screen,
            rehearsal=self._rehearsal,
            stops=self._stops,
            helpers=self._helpers,
            between_saves=lambda: self._pacing.seconds,
            past=self._silences,
            previous=self._previous,
            broken=self._broken,
        )
        self._lock.describe(attempt.board_path)
        self._now = attempt
        task = assignment(
            self._job,
            self._run,
            self._run_id,
            number,
            endpoint,
            resume,
            attempt.board_path,
            keepers.names,
            self._gate.branches,
        )
        try:
            return attempt.run(task, launcher, self._heard)
        finally:
            self._now = None
            self._silences = history.added(self._silences, attempt.silences)

    def _broken(self) -> None:
        """The ranks are about to be stopped; what savers hold need not be read."""
        if not self._job.checkpoint.memory:
            self._gate.read_ahead()

    def _saver_said(self, rank: int, event: Event) -> None:
        """Of a save, which may end after the attempt that it is of."""
        if event["event"] != "pruned":
            event = {**event, "attempt": attempt_of(event["id"])}
        if self._now is not None:
            self._now.hear(rank, event)
        elif (kept := self._heard(event)) is not None:
            self._tell(kept.pop("event"), **kept)

    def _heard(self, event: Event) -> Event | None:
        """Keep what a rank said that outlives its attempt; returns what the journal should keep."""
        keepers = self._keepers
        assert keepers is not None  # there are ranks
        match event["event"]:
            case "model":
                rank, known = event["rank"], self._reported.get(event["rank"])
                self._reported[rank] = history.Model(
                    event["hash"], Structure.from_json(event["model"])
                )
                self._gate.expect_model(history.model_of(self._reported, self._world_size))
                if known is not None and known.hash == event["hash"]:
                    return None
                if rank != 0:  # a large model's structure is written down once
                    return {**event, "model": None}
            case "first_step":
                keepers.work_on()
                self._gate.clean()
                self._journal.sync()
            case "imports":
                assert self._launcher is not None
                self._launcher.learn(StartUp(event["modules"], event["own"], event["staged"]))
            case "saved":
                self._pacing.saved(event["blocked"], event["seconds"])
            case "committed" if not self._gate.notice(event["id"], event["step"]):
                return None
            case "committed":
                # Ranks' files are read in any order, and an older one may come last.
                if event["step"] >= self._objects_step:
                    self._objects, self._objects_step = event["objects"], event["step"]
                keepers.notice()
            case "pruned":
                keepers.notice()
            case "refused" if event["kind"] == CorruptCheckpoint.__name__ and self._resume:
                # Only damage is the checkpoint's own fault. A model that differs is judged by the
                # gate itself, for every checkpoint.
                self._gate.not_loaded(self._resume, event["reason"])
        return event

    def _introduce(self) -> None:
        if self._past.run_id is None:
            self._tell(
                "run_started",
                run_id=self._run_id,
                name=self._job.name,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=autoglm_resume.__version__,
                world_size=self._world_size,
                launcher=self._job.launcher,
                job=shown(self._job),
                drills=[drill.spec for drill in self._drills],
            )
        self._tell(
            "supervisor_started",
            pid=os.getpid(),
            host=socket.gethostname(),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            resumed=self._past.run_id is not None,
        )
        if self._branch_from is not None:
            self._answers.forget()
            self._previous = None
            self._gate.branch(self._branch_from, self._number)
            self._objects_step, self._branch_from = self._branch_from, None

    def _bring_back(self) -> None:
        """Where no checkpoint is left, the newest that a replica has."""
        replicas, store = self._job.checkpoint.replicas, self._gate.store
        if not replicas or self._fresh or store.committed():
            return
        try:
            restored = restore(environment(self._job), store.root, replicas, self._past.run_id)
        except NoAcceptableCheckpoint as error:
            if self._past.checkpointed:
                raise
            self._tell("warning", text=f"{error.message}; this is taken to be a new run")
            return
        if restored is not None:
            self._run_id = restored.run
            self._tell_next("brought_back", id=restored.id, files=restored.files)

    def _helpers(self) -> frozenset[int]:
        """Children of this process that are no ranks."""
        kept = self._keepers.pids if self._keepers else frozenset()
        limit = self._limit.pids if self._limit else frozenset()
        return kept | limit | self._notifier.pids | self._ready.pids

    def _interrupted(self, keepers: Persistence, requeued: str = "") -> int:
        if self._answers.in_trouble:  # it may never answer: what is known has to do
            step = self._gate.checkpointed
        else:
            keepers.settle()
            newest = self._gate.newest()
            keepers.flush()
            step = newest.step if newest else 0
        number = self._stops[0] if self._stops else signal.SIGTERM
        if requeued:
            code, reason = Interrupted.exit_code, f"to be started again elsewhere: {requeued}"
        elif hurried(self._stops):
            code, reason = died_by_signal(signal.SIGINT), "stopped at once, as asked twice"
        elif step:
            code, reason = Interrupted.exit_code, f"stopped; continues from step {step}"
        elif number == signal.SIGUSR2 and self._limit is not None and self._limit.near():
            raise AutoglmError(
                "the time that the scheduler gives this job ends before its first checkpoint",
                hint="ask for more time, or save more often",
            )
        else:
            code, reason = died_by_signal(number), "stopped before the first checkpoint"
        self._tell("run_interrupted", code=code, reason=reason, step=step)
        return code

    def _signalled(self, number: signal.Signals) -> None:
        if number != SAVE:
            self._stop_asked(number)
        elif self._now is None or (step := self._now.save_now()) is None:
            self._tell("save_requested", step=None, reason="the ranks are not training yet")
        else:
            self._tell("save_requested", step=step)

    def _stop_asked(self, number: signal.Signals, by: str = "") -> None:
        self._stops.append(number)
        if len(self._stops) == 1:
            self._tell("stop_requested", by=by or number.name)

    def _time_limit(self) -> TimeLimit:
        return TimeLimit(
            self._loop,
            slurm.allocation(os.environ),
            slurm.lead(self._job.preemption.grace),
            lambda: self._stop_asked(signal.SIGUSR2, by="the end of the job's time"),
            self._tell,
        )

    def _tell_next(self, event: str, /, **fields: Any) -> None:
        """What the gate says is about the attempt to come."""
        if event == "committed" and fields["step"] >= self._objects_step:
            self._objects, self._objects_step = fields["objects"], fields["step"]
        self._tell(event, attempt=self._number, **fields)

    def _tell(self, event: str, /, **fields: Any) -> None:
        """Into the journal and onto the screen; an event of a rank keeps its own time."""
        record = stamped(event, {"attempt": max(0, self._number - 1), **fields})
        self._journal.append(record)
        self._notifier.event(record)
        self._screen.event(record)
