"""The supervisor: gate, launch, watch, conclude, decide, and again; everything into the journal."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import autoglm_resume
from autoglm_resume import events, linux, output
from autoglm_resume.cluster import slurm
from autoglm_resume.errors import (
    AutoglmError,
    Interrupted,
    NoAcceptableCheckpoint,
    died_by_signal,
)
from autoglm_resume.events import Event
from autoglm_resume.job.secret import Secrets
from autoglm_resume.job.spec import Job, dump, shown
from autoglm_resume.journal import Journal, stamped
from autoglm_resume.locks import Lock
from autoglm_resume.protocol.assignment import Beginning, ResumePoint
from autoglm_resume.supervise.attempt import Attempt, Outcome
from autoglm_resume.supervise.base import bounded
from autoglm_resume.supervise.base.assign import environment, world_size
from autoglm_resume.supervise.base.context import Presenter, RunContext
from autoglm_resume.supervise.base.event_loop import EventLoop, Signals
from autoglm_resume.supervise.base.gpu_exclusion import excluding
from autoglm_resume.supervise.base.run_directory import RunDirectory
from autoglm_resume.supervise.base.stops import ASKS, SAVE, Stops
from autoglm_resume.supervise.core import history, policy, result
from autoglm_resume.supervise.core.drill import Drill
from autoglm_resume.supervise.core.failure import Failure, Previous
from autoglm_resume.supervise.gate import RunGate
from autoglm_resume.supervise.inbox import Inbox
from autoglm_resume.supervise.local_node import LocalNode
from autoglm_resume.supervise.node import Member, Node, Order
from autoglm_resume.supervise.persistence import Persistence
from autoglm_resume.supervise.preflight.preflight import Preflight
from autoglm_resume.supervise.ranks.fault_injector import FaultInjector
from autoglm_resume.supervise.ranks.group import end_orphans
from autoglm_resume.supervise.recovery import Answering
from autoglm_resume.supervise.save_timer import SaveTimer
from autoglm_resume.supervise.services.notifier import Notifier
from autoglm_resume.supervise.services.replicator import restore
from autoglm_resume.supervise.time_limit import TimeLimit

WITHOUT_SESSION = "the script has no session of autoglm: --init-from had no effect on it"


class Supervisor:
    """One life of a run's supervisor."""

    def __init__(
        self,
        run: RunDirectory,
        lock: Lock,
        job: Job,
        drills: Sequence[Drill],
        screen: Presenter,
        branch_from: int | None = None,
        *,
        fresh: bool = False,
        beyond: int | None = None,
        begins: Beginning | None = None,
    ) -> None:
        """`branch_from` is the step to go back to, leaving newer checkpoints behind; a `fresh` run
        takes nothing from replicas. `beyond` is the step at which the run was finished, if it is to
        train further than that, `begins` what a new run has at step 0.
        """
        self._fresh = fresh
        self._beyond = beyond
        self._run = run
        self._lock = lock
        self._job = job
        self._screen = screen
        self._drills = drills
        self._branch_from = branch_from
        self._past = history.recall(run.events())
        if self._past.run_id is None and begins is not None:
            self._past = replace(self._past, begins=begins)
        self._run_id = self._past.run_id or uuid.uuid4().hex[:12]
        self._previous: Failure | Previous | None = self._past.previous
        self._stops = Stops()
        self._limit: TimeLimit | None = None
        self._node: Node | None = None
        self._persistence: Persistence | None = None
        self._attempt: Attempt | None = None
        self._journal = Journal(run.journal)
        self._loop = EventLoop()
        self._world_size = world_size(job)
        self._context = context = RunContext(
            self._loop,
            run,
            job,
            self._world_size,
            environment(job),
            self._tell,
            self._stops,
            screen,
        )
        self._preflight = Preflight(run, job, self._tell)
        self._secrets = Secrets(dump(job), context.environment)
        self._notifier = Notifier(self._loop, job, context.environment, run.path, self._tell)
        self._gate = RunGate(job, self._world_size, self._tell_next, self._past)
        # A power cut may have lost the journal's last lines, but two attempts must never share a
        # number: it tells their checkpoints of the same step apart.
        self._number = max(self._past.attempts, self._gate.store.next_attempt(), run.next_attempt())
        self._answers = Answering(context, self._past)
        self._save_timer = SaveTimer(
            job, self._past.trained, lambda: self._answers.failures, self._tell
        )
        self._inbox = Inbox(
            self._past,
            self._world_size,
            self._gate,
            self._save_timer,
            self._tell,
            self._journal.sync,
        )
        self._faults = FaultInjector(self._loop, drills, self._gate.store, self._tell)

    def run(self) -> int | None:
        """Bring the run to its end and return the exit code; None if it is to go on in another
        life, without what the journal says is excluded.

        Raises NoAcceptableCheckpoint, and UsageError for what the start of an attempt needs.
        """
        linux.adopt_orphans()
        signals = Signals(self._loop, (*ASKS, SAVE), self._signalled)
        began = time.monotonic()
        code: int | None = AutoglmError.exit_code
        try:
            self._bring_back()
            self._gate.read_ahead()
            self._notifier.start(self._run_id)
            self._introduce()
            self._preflight.begin()
            self._limit = self._time_limit()
            self._save_timer.choose()
            self._persistence = persistence = Persistence(
                self._context, self._run_id, self._gate, self._past, self._inbox.from_saver
            )
            self._inbox.connect(persistence)
            self._node = node = LocalNode(
                self._context, self._lock, self._run_id, self._past, persistence, self._helpers
            )
            code = self._bring_to_end(node, persistence, began)
            return code
        except AutoglmError as error:
            interrupted = isinstance(error, Interrupted)
            ended = events.RunInterrupted if interrupted else events.RunFailed
            self._tell(ended(code=error.exit_code, reason=error.message))
            raise
        except OSError as error:
            reason = f"{error.filename or self._run.path}: {error.strerror}"
            self._tell(events.RunFailed(code=AutoglmError.exit_code, reason=reason))
            raise AutoglmError(
                reason,
                hint=f"{output.command('resume', self._run.path)} continues when that is mended",
            ) from error
        finally:
            if self._limit is not None:
                self._limit.close()
            if self._node is not None:
                self._node.close()
            if self._persistence is not None:
                self._persistence.close(settled=self._answers.in_trouble)
            self._notifier.close(self._stops.hurried)
            end_orphans(self._node.left if self._node and code == 0 else frozenset())
            if code is None:
                signals.hand_over(self._stops)
            else:
                signals.close()
            self._journal.close()
            self._loop.close()

    def _bring_to_end(self, node: Node, persistence: Persistence, began: float) -> int | None:
        unfinished = self._answers.unfinished()
        if unfinished is not None and not self._carried_out(unfinished, persistence):
            return None
        given_up = self._answers.wait_on()
        outcome: Outcome | None = None
        while given_up is None:
            if self._stops:
                return self._interrupted(persistence, outcome)
            # No rank is alive here, so this is the moment to judge and to clean up.
            resume = self._gate.pass_gate(node.settle(self._gate.may_take_from_memory))
            if self._stops:
                return self._interrupted(persistence, outcome)
            outcome = self._try(node, resume)
            self._gate.reached(outcome.checkpointed)
            if self._beyond is not None and outcome.step <= self._beyond:
                result.require_more(outcome.failure, self._beyond, self._run.path, self._job.name)
            if outcome.completed:
                if self._past.begins is not None and outcome.step < 0:
                    self._tell(events.WarningGiven(text=WITHOUT_SESSION))
                persistence.flush()
                self._tell(
                    events.RunCompleted(
                        step=outcome.step,
                        objects=self._inbox.objects,
                        seconds=time.monotonic() - began,
                    )
                )
                return 0
            if self._stops or outcome.failure is None:
                return self._interrupted(persistence, outcome)
            self._previous = outcome.failure
            step = resume.step if resume else 0
            decision = self._answers.answer(step, outcome, self._gate.checkpointed)
            if isinstance(decision, policy.Requeue):
                return self._interrupted(persistence, outcome, decision.reason)
            if not self._carried_out(decision, persistence):
                return None
            given_up = self._answers.wait(decision)
        persistence.settle()
        self._tell(events.RunFailed(code=given_up.code, reason=given_up.reason, hint=given_up.hint))
        return given_up.code

    def _carried_out(self, decision: policy.Decision, persistence: Persistence) -> bool:
        """Whether this life can go on, once `decision` has been told."""
        if isinstance(decision, policy.Smaller):
            self._tell(events.Excluded(**asdict(excluding(self._job, decision.rank))))
            return False
        if isinstance(decision, policy.RollBack):
            persistence.settle()
            self._gate.go_back(decision.before, self._number)
            self._inbox.back_to(self._gate.checkpointed)
            persistence.protect()
            persistence.notice()  # replicas are to know of the branch, too
        return True

    def _try(self, node: Node, resume: ResumePoint | None) -> Outcome:
        self._preflight.before(self._gate.store, resume)
        self._save_timer.attempt()
        number, self._number = self._number, self._number + 1
        members = (Member(node.name, self._world_size),)
        attempt = self._attempt = Attempt(
            self._context,
            node,
            Order(number, 0, resume, members, self._gate.branches),
            self._faults,
            lambda: self._save_timer.seconds,
            self._previous,
            self._broken,
            self._kept,
            self._inbox.hear,
        )
        self._inbox.begin(node, attempt, resume)
        try:
            return attempt.run()
        finally:
            self._inbox.end()
            self._attempt = None

    def _broken(self) -> None:
        """The ranks are about to be stopped; what savers hold need not be read."""
        if not self._job.checkpoint.memory:
            self._gate.read_ahead()

    def _kept(self) -> int:
        """Of which step the newest checkpoint is, 0 without one, when no save is under way."""
        assert self._persistence is not None  # an attempt has ended
        self._persistence.settle()
        newest = self._gate.newest()
        return newest.step if newest else 0

    def _introduce(self) -> None:
        if self._past.run_id is None:
            if self._past.begins is not None:
                self._tell(events.BegunFrom(**asdict(self._past.begins)))
            self._tell(
                events.RunStarted(
                    run_id=self._run_id,
                    name=self._job.name,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    version=autoglm_resume.__version__,
                    world_size=self._world_size,
                    launcher=self._job.launcher,
                    job=shown(self._job),
                    drills=tuple(drill.spec for drill in self._drills),
                )
            )
        self._tell(
            events.SupervisorStarted(
                pid=os.getpid(),
                host=socket.gethostname(),
                boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                resumed=self._past.run_id is not None,
            )
        )
        if self._branch_from is not None:
            self._answers.forget()
            self._previous = None
            self._gate.branch(self._branch_from, self._number)
            self._inbox.back_to(self._branch_from)
            self._branch_from = None

    def _bring_back(self) -> None:
        """Where no checkpoint is left, the newest that a replica has."""
        replicas, store = self._job.checkpoint.replicas, self._gate.store
        begins = self._past.run_id is None and self._past.begins is not None
        if not replicas or self._fresh or begins or store.committed():
            return
        try:
            restored = restore(
                self._context.environment,
                store.root,
                replicas,
                self._past.run_id,
                self._gate.branches,
            )
        except NoAcceptableCheckpoint as error:
            if self._past.checkpointed:
                raise
            self._tell(events.WarningGiven(text=f"{error.message}; this is taken to be a new run"))
            return
        if restored is not None:
            self._run_id = restored.run
            self._number = max(self._number, restored.attempts)
            self._tell_next(events.BroughtBack(id=restored.id, files=restored.files))

    def _helpers(self) -> frozenset[int]:
        """Children of this process that are no ranks."""
        kept = self._persistence.pids if self._persistence else frozenset()
        limit = self._limit.pids if self._limit else frozenset()
        return kept | limit | self._notifier.pids | self._preflight.pids | bounded.hung()

    def _interrupted(
        self, persistence: Persistence, outcome: Outcome | None, requeued: str = ""
    ) -> int:
        if self._answers.in_trouble:  # it may never answer: what is known has to do
            step = self._gate.checkpointed
        else:
            step = self._kept()
            persistence.flush()
        lost = ""
        if outcome is not None and outcome.step > step:
            why = outcome.unsaved or "it was not saved"
            lost = f", not from step {outcome.step}, which it had completed: {why}"
        number = self._stops.first or signal.SIGTERM
        if requeued:
            code, reason = Interrupted.exit_code, f"to be started again elsewhere: {requeued}{lost}"
        elif self._stops.hurried():
            code, reason = died_by_signal(signal.SIGINT), "stopped at once, as asked twice"
        elif step:
            code, reason = Interrupted.exit_code, f"stopped; continues from step {step}{lost}"
        elif number == signal.SIGUSR2 and self._limit is not None and self._limit.near():
            raise AutoglmError(
                "the time that the scheduler gives this job ends before its first checkpoint",
                hint="ask for more time, or save more often",
            )
        else:
            code, reason = died_by_signal(number), "stopped before the first checkpoint"
        self._tell(events.RunInterrupted(code=code, reason=reason, step=step))
        return code

    def _signalled(self, number: signal.Signals) -> None:
        if number != SAVE:
            self._stop_asked(number)
        elif self._attempt is None or (step := self._attempt.save_now()) is None:
            self._tell(events.SaveRequested(step=None, reason="the ranks are not training yet"))
        else:
            self._tell(events.SaveRequested(step=step))

    def _stop_asked(self, number: signal.Signals, by: str = "") -> None:
        if self._stops.add(number):
            self._tell(events.StopRequested(by=by or number.name))

    def _time_limit(self) -> TimeLimit:
        return TimeLimit(
            self._loop,
            slurm.allocation(os.environ),
            slurm.lead(self._job.preemption.grace),
            lambda: self._stop_asked(signal.SIGUSR2, by="the end of the job's time"),
            self._tell,
        )

    def _tell_next(self, event: Event, /) -> None:
        """What the gate says is about the attempt to come."""
        if isinstance(event, events.Committed):
            self._inbox.committed(event)
        self._tell(event.but(attempt=self._number))

    def _tell(self, event: Event, /) -> None:
        """Into the journal and onto the screen; an event of a rank keeps its own time."""
        event = stamped(event, attempt=max(0, self._number - 1)).worded(self._secrets.out_of)
        self._journal.append(event)
        self._notifier.event(event)
        self._screen.event(event)
