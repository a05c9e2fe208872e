"""The supervisor's handle on the replicator process, and what it knows about the replicas."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoglm_resume import events
from autoglm_resume.checkpoint.format.ids import Branch
from autoglm_resume.checkpoint.replicas.plan import SLOW, Policy, counts, newest_counting
from autoglm_resume.checkpoint.replicas.repair import Restored
from autoglm_resume.checkpoint.storage.storage import check
from autoglm_resume.errors import AutoglmError, NoAcceptableCheckpoint
from autoglm_resume.protocol.assignment import HOME
from autoglm_resume.supervise.base import spawn
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.core.evidence import signal_name
from autoglm_resume.supervise.ranks.group import STUCK

MESSAGE = 1 << 20
RESTART_SECONDS = 30.0
"""After which a replicator that died is started again."""
FLUSH_SECONDS = 10.0
REPAIR_SECONDS = 600.0
"""A repair that takes longer than this is given up; falling back costs steps, but ends."""


class Replicator:
    """Copies of the checkpoints of one run, kept up to date by a process of its own.

    `targets` are absolute paths and buckets (`s3://…`); each holds the copies under the name
    `run`. `root` is the directory of the checkpoints, `log` gets what the process prints.
    `complete` are the ids known to be complete per target, as earlier `replicated` events say.
    Whatever the replicas do, nothing here raises after the constructor, and only `flush` and
    `repair` wait, as long as they are told.

    `tell` hears how far the copies are, what was repaired, and of a replica once when it falls
    behind, until it has caught up.
    """

    def __init__(
        self,
        loop: EventLoop,
        environment: Mapping[str, str],
        root: Path,
        run: str,
        targets: Sequence[str],
        policy: Policy,
        log: Path,
        tell: events.Tell,
        complete: Mapping[str, Iterable[str]] | None = None,
        branches: Callable[[], Sequence[Branch]] = lambda: (),
    ) -> None:
        """`branches` says where the run left newer checkpoints behind, so far.

        Raises UsageError for a target that can never work, or a missing package.
        """
        for target in targets:
            check(target)
        self._loop = loop
        self._environment = dict(environment)
        self._root = root
        self._run = run
        self._targets = list(targets)
        self._policy: Policy = policy
        self._log = log
        self._tell = tell
        self._branches = branches
        known = complete or {}
        self._complete = {target: frozenset(known.get(target, ())) for target in targets}
        self._number = 0
        self._rounds: dict[str, int] = {}
        self._failed: dict[str, bool] = {}
        self._waiting: dict[str, int] = {}
        self._behind: dict[str, float] = {}
        """Since when, in monotonic seconds."""
        self._warned = False
        self._repaired: dict[str, Any] | None = None
        self._damaged: set[str] = set()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # The process

    def start(self) -> None:
        """Begin to copy what is missing; without targets, nothing happens here or later."""
        self._loop.cancel(self.start)
        if not self._targets or self._process is not None:
            return
        known = [str(os.getpid()), str(self._root), self._run, *self._targets]
        try:
            self._process, ours = spawn.start(
                "autoglm_resume.savers.replicator", known, self._environment, self._log
            )
        except OSError as error:
            self._lost(f"it could not be started: {error.strerror}")
            return
        self._socket = ours
        self._loop.watch(ours, self._readable)
        self._rounds.clear()
        self._send({"op": "replicate", "number": self._number, "branches": self._branches()})

    @property
    def pids(self) -> frozenset[int]:
        """Of the process, if there is one: it is not an orphan that a rank left behind."""
        return frozenset([self._process.pid] if self._process else [])

    def close(self) -> None:
        """End the process: whoever starts it again goes on where it stopped."""
        self._loop.cancel(self.start)
        self._end()

    def _end(self) -> int | None:
        if self._socket is not None:
            self._loop.forget(self._socket)
            self._socket.close()
            self._socket = None
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STUCK)  # one that waits for a dead mount does not even hear this
        return process.returncode

    def _lost(self, reason: str) -> None:
        if not self._warned:
            text = f"the replicator is gone ({reason}) and will be started again; see {self._log}"
            self._tell(events.WarningGiven(text=text))
        self._warned = True
        self._loop.every(RESTART_SECONDS, self.start)

    # What is asked of it

    def notice(self) -> None:
        """A checkpoint was committed, or deleted: list what there is to do."""
        self._ask("replicate")
        for target in self._targets:
            waiting = self._number - self._rounds.get(target, 0)
            if self._process is not None and waiting > SLOW:
                self._fell_behind(target, f"{waiting} checkpoints wait to be copied")

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until every replica has what there is now, at most `seconds`; whether they have.

        Each gets one more try at once, and who cannot be reached is not waited for. Says in the
        journal how long it took and what is missing. Events are handled meanwhile.
        """
        if self._process is None or not self._targets:
            return not self._targets
        began = time.monotonic()
        self._ask("flush")
        self._loop.wait(
            lambda: self._process is None or not self._unasked(), time.monotonic() + seconds
        )
        short = [t for t in self._targets if t in self._unasked() or self._failed.get(t, True)]
        behind = {target: self._waiting.get(target) for target in short}
        self._tell(events.ReplicasFlushed(seconds=time.monotonic() - began, behind=behind))
        return not behind

    def repair(
        self,
        id: str,
        digest: str | None = None,
        stopped: Callable[[], bool] = lambda: False,
        seconds: float = REPAIR_SECONDS,
    ) -> list[str]:
        """Have every bad or missing file of checkpoint `id` replaced by a replica's good copy.

        Returns the files, relative to the root, that were replaced: judge the checkpoint again
        then. Returns nothing, having said why in the journal, when there is no replica or no good
        copy, `seconds` are over, or `stopped()`. `digest` is that of its manifest, if known.
        Events are handled meanwhile.
        """
        if not self._targets:
            return []
        began = time.monotonic()
        self.start()
        self._repaired = None
        self._send({"op": "repair", "id": id, "digest": digest})
        self._loop.wait(
            lambda: self._answer(id) is not None or self._process is None or stopped(),
            time.monotonic() + seconds,
        )
        answer = self._answer(id)
        spent = time.monotonic() - began
        if answer is None:
            reason = "no answer from the replicator"
        elif answer["reason"] or not answer["files"]:
            reason = answer["reason"] or "every byte of it is as it was written"
        else:
            self._tell(events.Repaired(id=id, files=tuple(answer["files"]), seconds=spent))
            return list(answer["files"])
        self._tell(events.RepairFailed(id=id, reason=reason, seconds=spent))
        return []

    # What is known

    def counts(self, id: str) -> bool:
        """Whether `id`, committed here, counts as committed under the job's policy."""
        return counts(id, self._policy, self._complete)

    def protected(self, ids: Sequence[str]) -> frozenset[str]:
        """What of `ids`, all committed here, retention must keep: the newest that counts."""
        newest = newest_counting(ids, self._policy, self._complete)
        return frozenset([newest] if newest else [])

    # Messages

    def _ask(self, op: str) -> None:
        self._number += 1
        self._send({"op": op, "number": self._number, "branches": self._branches()})

    def _send(self, request: dict[str, Any]) -> None:
        if self._socket is not None:
            # A full buffer means that it has enough to do; it lists everything then.
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self._socket.send(json.dumps(request).encode(), socket.MSG_DONTWAIT)

    def _unasked(self) -> list[str]:
        """Targets that have not listed since the last request."""
        return [target for target in self._targets if self._rounds.get(target, 0) < self._number]

    def _answer(self, id: str) -> dict[str, Any] | None:
        answer = self._repaired
        return answer if answer is not None and answer["id"] == id else None

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(MESSAGE)
        except ConnectionResetError:
            message = b""
        if message:
            self._heard(json.loads(message))
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:  # the socket closes a moment before it has an exit code
                self._process.wait(timeout=1)
        code = self._end()
        killed = code is not None and code < 0
        self._lost(f"it died by {signal_name(-(code or 0))}" if killed else f"exit code {code}")

    def _heard(self, message: dict[str, Any]) -> None:
        op, target = message.pop("op"), message.get("replica", "")
        match op:
            case "listed":
                self._complete[target] = frozenset(message["ids"])
                self._waiting[target] = message["waiting"]
            case "replicated":
                self._tell(events.Replicated(**message))
            case "round":
                self._rounds[target] = message["number"]
                self._failed[target] = bool(message["failure"])
                if message["failure"]:
                    self._fell_behind(target, message["failure"])
                else:
                    self._caught_up(target)
            case "damaged" if message["id"] not in self._damaged:
                self._damaged.add(message["id"])
                self._tell(events.WarningGiven(text=message["reason"]))
            case "repaired":
                self._damaged.discard(message["id"])
                self._repaired = message

    def _fell_behind(self, target: str, reason: str) -> None:
        if target not in self._behind:
            self._behind[target] = time.monotonic()
            behind = self._waiting.get(target)
            self._tell(events.ReplicaBehind(replica=target, behind=behind, reason=reason))

    def _caught_up(self, target: str) -> None:
        self._warned = False
        if (since := self._behind.pop(target, None)) is not None:
            self._tell(events.ReplicaCaughtUp(replica=target, seconds=time.monotonic() - since))


def restore(
    environment: Mapping[str, str],
    root: Path,
    targets: Sequence[str],
    run: str | None = None,
    branches: Sequence[Branch] = (),
) -> Restored | None:
    """Bring the newest checkpoint that the targets can give into the empty `root`.

    For a start that finds no checkpoint where there may have been some: of `run`, or, when even
    the run's directory is lost, of the run that committed last; nothing of `branches` that were
    given up, as far as that is known here or there. None if no target has one. Takes
    as long as it takes. Raises NoAcceptableCheckpoint when that cannot be known, or nothing
    that is there can be used.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "autoglm_resume.savers.replicator", "restore"),
            *(str(root), run or "", json.dumps(branches), *targets),
        ],
        cwd=HOME,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        raise AutoglmError(f"the replicator ended with exit code {done.returncode}")
    answer = json.loads(done.stdout)
    if answer["reason"]:
        raise NoAcceptableCheckpoint(
            f"{root}: there is no checkpoint here, and no replica can give one: {answer['reason']}",
            hint="make the replica reachable; or start over with `autoglm run --fresh`",
        )
    return Restored(**answer["restored"]) if answer["restored"] else None
