"""The replicator: copies every committed checkpoint to the replicas, beside the training.

One process per run, at the lowest priority, with one thread per replica, so that a slow one holds
up no other. It finds out by itself what is missing, and goes on after an outage where it stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoglm_resume import linux, output
from autoglm_resume.checkpoint.format.ids import Branch, newest_first
from autoglm_resume.checkpoint.replicas.mirror import committed, replicate, tell_branches
from autoglm_resume.checkpoint.replicas.plan import (
    CommittedFiles,
    branches_in,
    by_checkpoint,
    deletions,
    is_complete,
    missing,
    retry_in,
)
from autoglm_resume.checkpoint.replicas.repair import repair, restore_missing
from autoglm_resume.checkpoint.storage.storage import Storage, open_storage
from autoglm_resume.checkpoint.store.gate import superseded
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.errors import AutoglmError, CheckpointError

MESSAGE = 1 << 20
REPORTED = 1000
"""Newest complete checkpoints in one message, which must fit into the socket's buffer."""

Tell = Callable[..., None]


class Copier(threading.Thread):
    """Keeps one replica up to date."""

    def __init__(self, store: Store, target: str, run: str, tell: Tell) -> None:
        super().__init__(name=target, daemon=True)
        self._store = store
        self._target = target
        self._run = run
        self._tell = tell
        self._news = threading.Condition()
        self._asked = 0
        self._done = -1
        self._hurry = False
        self._failures = 0
        self._branches: frozenset[Branch] = frozenset()
        self._here: dict[str, CommittedFiles] = {}
        self._damaged: frozenset[str] = frozenset()

    def notice(self, number: int, hurry: bool, branches: Collection[Branch] = ()) -> None:
        """List and copy again; `number` counts the requests, `hurry` ends a wait for a retry.

        `branches` are all where the run left newer checkpoints behind.
        """
        with self._news:
            self._branches |= frozenset(branches)
            self._asked = max(self._asked, number)
            self._hurry |= hurry
            self._news.notify()

    def run(self) -> None:
        """For as long as the process lives."""
        while True:
            number = self._next()
            failure = ""
            try:
                self._round()
            except (OSError, AutoglmError) as error:
                failure = _reason(error)
                self._failures += 1
            else:
                self._done, self._failures = number, 0
            self._tell("round", replica=self._target, number=number, failure=failure)

    def _next(self) -> int:
        """Wait for something to do; returns the number of the last request."""
        with self._news:
            if self._failures:
                delay = retry_in(self._failures, random.random())
                self._news.wait_for(lambda: self._hurry, delay)
            else:
                self._news.wait_for(lambda: self._asked > self._done)
            self._hurry = False
            return self._asked

    def forgive(self) -> None:
        """List damaged checkpoints once more: some were repaired."""
        self._damaged = frozenset()

    def _round(self) -> None:
        self._list()
        storage = open_storage(self._target, self._run)
        names = storage.names()
        there, branches = by_checkpoint(names), self._branches
        # Before anything else: when only the replica is left, nobody could tell.
        tell_branches(branches, names, storage)
        branches |= branches_in(names)
        while True:
            self._list()
            complete = [id for id in newest_first(self._here) if is_complete(id, self._here, there)]
            lacking = missing(self._here, there)
            waiting = [id for id in lacking if superseded(id, branches) is None]
            ids = complete[:REPORTED]
            self._tell("listed", replica=self._target, ids=ids, waiting=len(waiting))
            if not waiting:
                break
            self._copy(waiting[0], there, storage)
        present = [path.name for path in (*self._store.committed(), *self._store.uncommitted())]
        for id in deletions(present, self._here, there, branches):
            storage.remove(id)

    def _list(self) -> None:
        found = committed(self._store, self._here)
        self._here = {id: copy for id, copy in found.items() if id not in self._damaged}

    def _copy(self, id: str, there: dict[str, dict[str, int]], storage: Storage) -> None:
        began = time.monotonic()
        try:
            sent = replicate(self._store, id, self._here, there, storage)
        except CheckpointError as error:
            # Not this replica's fault: the gate judges it.
            self._damaged |= {id}
            self._tell("damaged", id=id, reason=error.message)
        except FileNotFoundError:
            if self._store.directory(id).exists():
                raise
            # Retention was faster.
        else:
            self._failures = 0
            seconds = time.monotonic() - began
            self._tell("replicated", id=id, replica=self._target, seconds=seconds, bytes=sent)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    hint = getattr(error, "hint", "")
    return f"{error} ({hint})" if hint else str(error)


def answer(
    store: Store, targets: Sequence[str], run: str, request: dict[str, Any]
) -> dict[str, Any]:
    """Repair the checkpoint that is asked for; what to say about it."""
    files: list[Path] = []
    reason = ""
    try:
        replicas = [open_storage(target, run) for target in targets]
        files = repair(store, request["id"], replicas, request["digest"])
    except (OSError, AutoglmError) as error:
        reason = _reason(error)
    names = [str(path.relative_to(store.root)) for path in files]
    return {"id": request["id"], "files": names, "reason": reason}


def give_back(
    root: Path, run: str, targets: Sequence[str], branches: Collection[Branch] = ()
) -> dict[str, Any]:
    """Restore the newest checkpoint of `run`, or of any; what to say about it."""
    try:
        restored = restore_missing(Store(root), targets, run or None, branches)
    except (OSError, AutoglmError) as error:
        return {"restored": None, "reason": _reason(error)}
    return {"restored": asdict(restored) if restored else None, "reason": ""}


def serve(control: socket.socket, root: Path, run: str, targets: Sequence[str]) -> None:
    """Replicate until the supervisor is gone."""
    store = Store(root)

    def tell(op: str, **fields: Any) -> None:
        with suppress(OSError):  # the supervisor is gone, and so are we
            control.send(json.dumps({"op": op, **fields}).encode())

    def give_up(fault: threading.ExceptHookArgs) -> None:
        traceback.print_exception(fault.exc_value)
        sys.stderr.flush()
        os._exit(1)  # rather than leave a replica to itself; the supervisor starts it again

    threading.excepthook = give_up
    copiers = [Copier(store, target, run, tell) for target in targets]
    for copier in copiers:
        copier.start()
    while message := control.recv(MESSAGE):
        request = json.loads(message)
        if request["op"] == "repair":
            tell("repaired", **answer(store, targets, run, request))
            for copier in copiers:
                copier.forgive()
        else:
            branches = [Branch(*each) for each in request.get("branches", ())]
            for copier in copiers:
                copier.notice(request["number"], request["op"] == "flush", branches)


def main() -> None:
    """`python -m autoglm_resume.savers.replicator FD SUPERVISOR ROOT RUN TARGET…`

    Or `… restore ROOT RUN BRANCHES TARGET…`, with JSON of them, which prints what came of it.
    """
    if sys.argv[1] == "restore":
        root, run, known, *targets = sys.argv[2:]
        branches = [Branch(*each) for each in json.loads(known)]
        output.document(give_back(Path(root), run, targets, branches))
        return
    descriptor, supervisor, root, run, *targets = sys.argv[1:]
    control = socket.socket(fileno=int(descriptor))
    control.set_inheritable(False)
    linux.die_with_parent(int(supervisor))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.stand_back()
    serve(control, Path(root), run, targets)
    # Threads may be in the middle of a request; whoever comes next goes on there.
    os._exit(0)


if __name__ == "__main__":
    output.begin(noting=True)
    main()
