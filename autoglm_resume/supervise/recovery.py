"""Between two attempts: decide, tell the journal, and wait for as long as that takes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from dataclasses import replace
from pathlib import Path

from autoglm_resume import events
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.cluster import slurm
from autoglm_resume.errors import AutoglmError, CheckpointError
from autoglm_resume.job.spec import Job
from autoglm_resume.job.units import format_duration
from autoglm_resume.supervise.attempt import Outcome
from autoglm_resume.supervise.base.context import RunContext
from autoglm_resume.supervise.base.gpu_exclusion import can_shrink
from autoglm_resume.supervise.core import policy
from autoglm_resume.supervise.core.history import History
from autoglm_resume.supervise.storage_wait import StorageWait


class Answering:
    """The failures of a run, those of earlier lives included, and the answers to them."""

    def __init__(self, context: RunContext, past: History) -> None:
        self._job = job = context.job
        self._loop = loop = context.loop
        self._stops = context.stops
        self._tell = context.tell
        self._ended = list(past.ended)
        self._pending = past.pending
        self._rules = rules(job)
        self._store = Store(Path(job.checkpoint.dir))
        self._watch = StorageWait(loop, [self._store.root, Path(job.run_dir)], self._stops.asked)
        self.failures = past.failures
        """Of all attempts ever."""
        self.in_trouble = False
        """Whether a stop ended a pause while what it waited for still had a problem."""

    def forget(self) -> None:
        """A person goes back to an older checkpoint: what failed since is of no concern."""
        self._ended.clear()
        self._pending = None

    def answer(self, started_from: int, outcome: Outcome, checkpointed: int) -> policy.Decision:
        """Answer the failure of an attempt that began with the checkpoint of `started_from`."""
        failure, now = outcome.failure, time.time()
        assert failure is not None
        self.failures += 1
        ended = policy.Ended(
            started_from,
            outcome.step,
            checkpointed,
            outcome.lived,
            failure.refused,
            failure.kind,
            failure.place,
            now,
        )
        decision = policy.decide([*self._ended, ended], failure, self._rules, now, random.random())
        self._ended.append(replace(ended, action=decision.action))
        self._told(decision)
        return decision

    def wait(self, decision: policy.Decision) -> policy.GiveUp | None:
        """Until the next attempt may begin, or a stop is asked for; what takes too long ends it."""
        if isinstance(decision, policy.GiveUp):
            return decision
        if not isinstance(decision, policy.Pause):
            self._loop.wait(self._stops.asked, time.monotonic() + decision.delay)
            return None
        return self._pause(decision.until, decision.longest)

    def unfinished(self) -> policy.RollBack | policy.Smaller | None:
        """What an earlier life decided on, but was killed before it did it."""
        pending = self._pending
        if pending is None or pending.done:
            return None
        if pending.action == policy.Smaller.action:
            here = pending.host == socket.gethostname()  # elsewhere GPUs are others
            return policy.Smaller(pending.rank, pending.reason) if here else None
        return policy.RollBack(pending.delay, pending.reason, pending.before)

    def wait_on(self) -> policy.GiveUp | None:
        """The rest of what an earlier life was waiting for when it was killed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.action == "pause":
            longest = policy.remaining(self._rules.longest_pause, pending.since, time.time())
            return self._pause(pending.until, longest)
        left = policy.remaining(pending.delay, pending.since, time.time())
        if left:
            self._tell(events.WaitingOn(seconds=left, reason=pending.reason))
            self._loop.wait(self._stops.asked, time.monotonic() + left)
        return None

    def _pause(self, until: str, longest: float) -> policy.GiveUp | None:
        began = time.monotonic()
        needed = self._needed() if until == "space" else 0

        def paused(problem: str) -> None:
            self._tell(events.Paused(until=until, reason=problem))

        problem = self._watch.wait(needed, longest, paused)
        self._tell(events.PauseEnded(seconds=time.monotonic() - began, problem=problem))
        self.in_trouble = bool(problem and self._stops)
        if not problem or self._stops:
            return None
        waited = f"waited {format_duration(self._rules.longest_pause)} (restart.longest_pause)"
        given_up = policy.GiveUp(f"{waited} for {until}: {problem}", AutoglmError.exit_code)
        self._told(given_up)
        return given_up

    def _needed(self) -> int:
        """Bytes that must be free for saves not to fail again at once."""
        sizes = [self._job.guards.free_disk]
        for path in self._store.committed():
            with contextlib.suppress(CheckpointError, OSError):
                sizes.append(self._store.load_manifest(path).stored)
        return max(sizes)

    def _told(self, decision: policy.Decision) -> None:
        # With what the next life needs to carry it out if this one is killed first.
        made = events.DecisionMade(
            action=decision.action,
            delay=decision.delay,
            reason=decision.reason,
            breaker=decision.breaker,
        )
        match decision:
            case policy.Pause(until=until):
                made = made.but(until=until)
            case policy.RollBack(before=before):
                made = made.but(before=before)
            case policy.Smaller(rank=rank):
                made = made.but(rank=rank, host=socket.gethostname())
        self._tell(made)


def rules(job: Job) -> policy.Rules:
    """What the policy goes by on this machine."""
    restart = job.restart
    return policy.Rules(
        max_restarts=restart.max_restarts,
        backoff=restart.backoff,
        max_backoff=restart.max_backoff,
        without_progress=restart.without_progress,
        cool_down=restart.cool_down,
        cool_downs=restart.cool_downs,
        failures=restart.window.failures,
        within=restart.window.within,
        longest_pause=restart.longest_pause,
        on=restart.on,
        scheduler=slurm.allocation(os.environ) is not None,
        can_shrink=can_shrink(job),
    )
