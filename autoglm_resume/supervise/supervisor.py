"""The supervisor: gate, launch, watch, conclude, decide, and again; everything into the journal."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autoglm_resume
from autoglm_resume import linux
from autoglm_resume.checkpoint.structure import Structure
from autoglm_resume.errors import AutoglmError, CorruptCheckpoint, Interrupted, died_by_signal
from autoglm_resume.job.spec import Job, dump
from autoglm_resume.journal import Event, Journal, stamped
from autoglm_resume.supervise import history, policy
from autoglm_resume.supervise.attempt import Attempt, Outcome, hurried
from autoglm_resume.supervise.drill import Drill
from autoglm_resume.supervise.gatekeeper import Gatekeeper
from autoglm_resume.supervise.group import end_orphans
from autoglm_resume.supervise.launcher import Endpoint, Launcher, Torchrun, Warm
from autoglm_resume.supervise.node import visible_gpus
from autoglm_resume.supervise.pump import Pump, Signals
from autoglm_resume.supervise.rehearse import Rehearsal
from autoglm_resume.supervise.rundir import Lock, RunDirectory
from autoglm_resume.worker.contract import Assignment, ResumePoint, Source, shared_environment

if TYPE_CHECKING:  # a presenter is handed in; this layer does not depend on it
    from autoglm_resume.observe.live import Screen

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def world_size(job: Job) -> int:
    """Ranks of a job on this machine."""
    asked = job.nproc_per_node
    return max(1, visible_gpus()) if asked == "auto" else asked


def environment(job: Job) -> dict[str, str]:
    """What every process of the job inherits."""
    return {**os.environ, **shared_environment(world_size(job)), **job.env}


def assignment(
    job: Job,
    run: RunDirectory,
    run_id: str,
    number: int,
    endpoint: Endpoint,
    resume: ResumePoint | None,
    board: str,
) -> Assignment:
    """What the ranks of attempt `number` are told."""
    every = job.checkpoint.every
    return Assignment(
        run_id=run_id,
        attempt=number,
        world_size=world_size(job),
        master_addr="127.0.0.1",
        master_port=endpoint.port,
        agent_store=endpoint.served,
        max_restarts=job.restart.max_restarts,
        supervisor=os.getpid(),
        directory=str(run.attempt(number)),
        board=board,
        source=Source(
            str(job.script) if job.script else None, job.module, tuple(job.args), str(job.workdir)
        ),
        checkpoint_dir=str(job.checkpoint.dir),
        resume=resume,
        every_steps=every.steps,
        keep=job.checkpoint.keep,
        check_model=job.guards.model == "strict",
        config_files=tuple(str(path) for path in job.guards.config_files),
        environment=dict(job.env),
    )


class Supervisor:
    """One life of a run's supervisor."""

    def __init__(
        self, run: RunDirectory, lock: Lock, job: Job, drills: Sequence[Drill], screen: Screen
    ) -> None:
        self._run = run
        self._lock = lock
        self._job = job
        self._screen = screen
        self._past = history.recall(run.events())
        self._ended = list(self._past.ended)
        self._run_id = self._past.run_id or uuid.uuid4().hex[:12]
        self._reported = dict(self._past.models)
        self._objects = self._past.objects or {}
        self._objects_step = self._past.checkpointed
        self._stops: list[signal.Signals] = []
        self._journal = Journal(run.journal)
        self._pump = Pump()
        self._world_size = world_size(job)
        self._gate = Gatekeeper(
            job,
            self._world_size,
            self._tell_next,
            history.model_of(self._past.models, self._world_size),
            self._past.checkpointed,
        )
        # A power cut may have lost the journal's last lines, but two attempts must never share a
        # number: it tells their checkpoints of the same step apart.
        self._number = max(self._past.attempts, self._gate.store.next_attempt(), run.next_attempt())
        self._rehearsal = Rehearsal(self._pump, drills, self._gate.store, self._tell)
        self._drills = drills

    def run(self) -> int:
        """Bring the run to its end and return the exit code.

        Raises NoAcceptableCheckpoint, and UsageError for what the start of an attempt needs.
        """
        linux.adopt_orphans()
        signals = Signals(self._pump, STOPS, self._stop_asked)
        began = time.monotonic()
        self._introduce()
        launcher = self._launcher()
        try:
            return self._bring_to_end(launcher, began)
        except AutoglmError as error:
            self._tell("run_failed", code=error.exit_code, reason=error.message)
            raise
        except OSError as error:
            reason = f"{error.filename or self._run.path}: {error.strerror}"
            self._tell("run_failed", code=AutoglmError.exit_code, reason=reason)
            raise AutoglmError(
                reason, hint="autoglm resume continues when that is mended"
            ) from error
        finally:
            launcher.close()
            end_orphans(frozenset())
            signals.close()
            self._journal.close()
            self._pump.close()

    def _bring_to_end(self, launcher: Launcher, began: float) -> int:
        while True:
            # Nobody is alive here, so this is the moment to judge and to clean up.
            resume = self._gate.pass_gate()
            if self._stops:
                return self._interrupted(resume)
            outcome = self._attempt(launcher, resume)
            self._gate.checkpointed = max(self._gate.checkpointed, outcome.checkpointed)
            if outcome.completed:
                self._tell(
                    "run_completed",
                    step=outcome.step,
                    objects=self._objects,
                    seconds=time.monotonic() - began,
                )
                return 0
            if self._stops or outcome.failure is None:
                return self._interrupted(self._gate.newest())
            self._ended.append(
                policy.Ended(
                    resume.step if resume else 0,
                    outcome.step,
                    self._gate.checkpointed,
                    outcome.lived,
                    outcome.failure.refused,
                )
            )
            decision = policy.decide(self._ended, outcome.failure, self._rules(), random.random())
            if isinstance(decision, policy.GiveUp):
                self._tell("decision", action="give_up", delay=0, reason=decision.reason)
                self._tell("run_failed", code=decision.code, reason=decision.reason)
                return decision.code
            self._tell("decision", action="restart", delay=decision.delay, reason=decision.reason)
            self._pump.wait(lambda: bool(self._stops), time.monotonic() + decision.delay)

    def _attempt(self, launcher: Launcher, resume: ResumePoint | None) -> Outcome:
        number, self._number = self._number, self._number + 1
        self._run.attempt(number).mkdir(parents=True, exist_ok=True)
        fixed = self._job.env.get("MASTER_PORT")
        endpoint = launcher.rendezvous(int(fixed) if fixed else None, lambda: bool(self._stops))
        attempt = Attempt(
            pump=self._pump,
            job=self._job,
            world_size=self._world_size,
            tell=self._tell,
            screen=self._screen,
            rehearsal=self._rehearsal,
            stops=self._stops,
        )
        self._lock.describe(attempt.board_path)
        task = assignment(
            self._job, self._run, self._run_id, number, endpoint, resume, attempt.board_path
        )
        return attempt.run(task, launcher, lambda event: self._heard(launcher, event))

    def _heard(self, launcher: Launcher, event: Event) -> Event | None:
        """Keep what a rank said that outlives its attempt; returns what the journal should keep."""
        match event["event"]:
            case "model":
                rank, known = event["rank"], self._reported.get(event["rank"])
                self._reported[rank] = history.Model(
                    event["hash"], Structure.from_json(event["model"])
                )
                self._gate.model = history.model_of(self._reported, self._world_size)
                if known is not None and known.hash == event["hash"]:
                    return None
                if rank != 0:  # a large model's structure is written down once
                    return {**event, "model": None}
            case "first_step":
                self._gate.clean()
                self._journal.sync()
            case "imports":
                launcher.learn(event["modules"])
            case "committed":
                # Ranks' files are read in any order, and an older one may come last.
                if event["step"] >= self._objects_step:
                    self._objects, self._objects_step = event["objects"], event["step"]
                self._gate.notice(event["id"])
            case "refused" if event["kind"] == CorruptCheckpoint.__name__:
                # Only damage is the checkpoint's own fault. A model that differs is judged by the
                # gate itself, for every checkpoint.
                self._gate.refused[event["id"]] = event["reason"]
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
                job=dump(self._job),
                drills=[drill.spec for drill in self._drills],
            )
        self._tell(
            "supervisor_started",
            pid=os.getpid(),
            host=socket.gethostname(),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            resumed=self._past.run_id is not None,
        )

    def _launcher(self) -> Launcher:
        if self._job.launcher == "torchrun":
            return Torchrun(environment(self._job))
        return Warm(
            self._pump,
            environment(self._job),
            [*self._job.preload, *self._past.imports],
            self._run.path / "zygote.log",
            self._tell,
        )

    def _interrupted(self, newest: ResumePoint | None) -> int:
        number = self._stops[0] if self._stops else signal.SIGTERM
        if hurried(self._stops):
            code, reason = died_by_signal(signal.SIGINT), "stopped at once, as asked twice"
        elif newest is not None:
            code, reason = Interrupted.exit_code, f"stopped; continues from step {newest.step}"
        else:
            code, reason = died_by_signal(number), "stopped before the first checkpoint"
        step = newest.step if newest else 0
        self._tell("run_interrupted", code=code, reason=reason, step=step)
        return code

    def _stop_asked(self, number: signal.Signals) -> None:
        self._stops.append(number)
        if len(self._stops) == 1:
            self._tell("stop_requested", by=number.name)

    def _rules(self) -> policy.Rules:
        restart = self._job.restart
        return policy.Rules(
            restart.max_restarts, restart.backoff, restart.max_backoff, restart.without_progress
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
        self._screen.event(record)
