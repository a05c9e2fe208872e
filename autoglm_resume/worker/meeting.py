"""Where the ranks of one launch agree, through whatever they can all read and write.

    rank 0                          rank r
    call: a word of its own    →
                               ←    reply to that word, with one of r's own
    answer: names all words    →    taken only if it names both

Words never repeat. So nobody takes what an earlier launch has left behind for what is said now, in
files or in a store that outlives its launches, and the ranks may come in any order, however far
apart. Ranks of another launch, where the environment tells them apart, are not listened to.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from autoglm_resume import files, output
from autoglm_resume.errors import AutoglmError

FIRST = 1800.0
"""Seconds in which all ranks must have come, as with torch's own process groups."""
PATIENCE = 86_400.0
"""Seconds for rank 0, which may read every byte of a checkpoint, or have it repaired; if it dies,
whoever launched the ranks ends the others."""
GRACE = 20.0
"""Seconds in which the ranks of a launch that is restarted may still see those before them."""
PAUSE = 0.02
"""Seconds between two looks: nothing tells of a change in a file on another machine."""
SAY = 10.0
"""Seconds after which a person is told what is waited for."""

_SHARED = (
    *("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    *("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
)
"""Variables that the ranks of a launch have in common, and others mostly do not."""


class Notes(Protocol):
    """Notes by name, of which there is always the last or the one before."""

    def get(self, name: str) -> str | None: ...

    def set(self, name: str, text: str) -> None: ...


class InStore:
    """In a store of torch.distributed."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __str__(self) -> str:
        return "the process group's store"

    def get(self, name: str) -> str | None:
        if not self._store.check([name]):
            return None
        text: str = self._store.get(name).decode()
        return text

    def set(self, name: str, text: str) -> None:
        self._store.set(name, text)


LARGEST = 1 << 24
"""Bytes of what one rank says to the others."""


class InFiles:
    """In a directory that all ranks share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __str__(self) -> str:
        return str(self._directory)

    def get(self, name: str) -> str | None:
        with suppress(FileNotFoundError):
            return files.read(self._directory / name, LARGEST).decode()
        return None

    def set(self, name: str, text: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        files.write(self._directory / name, text.encode(), durable=False)


class Meeting:
    """One agreement. `left_out` says, of a rank that waits, why no answer will ever come for it."""

    def __init__(
        self, board: Notes, rank: int, world_size: int, left_out: Callable[[], str] = lambda: ""
    ) -> None:
        self.board = board
        self._rank = rank
        self._world_size = world_size
        self._left_out = left_out
        self._word = uuid.uuid4().hex
        self._launch = launch_of(os.environ)
        self._words: dict[str, str] = {}

    def gather(self, own: str) -> list[str]:
        """For rank 0: what every rank says, in order. Raises AutoglmError if some never come."""
        self._set("call", word=self._word)
        found = {0: own}
        wait = Wait(FIRST)
        while len(found) < self._world_size:
            for rank in range(1, self._world_size):
                reply = self._get(f"rank {rank}")
                if rank not in found and reply.get("call") == self._word:
                    found[rank] = reply["said"]
                    self._words[str(rank)] = reply["word"]
            if len(found) < self._world_size:
                missing = sorted(set(range(self._world_size)) - found.keys())
                wait.pause(f"rank 0 waits for rank {', '.join(map(str, missing[:8]))}", self.board)
        return [found[rank] for rank in range(self._world_size)]

    def answer(self, text: str) -> None:
        """For rank 0: tell the others."""
        self._set("answer", call=self._word, words=self._words, said=text)

    def ask(self, own: str) -> str:
        """For the others: what rank 0 answers. Raises AutoglmError if it never does."""
        called = ""
        wait, left_out = Wait(FIRST), Wait(GRACE)
        while True:
            call = self._get("call").get("word", "")
            if call and call != called:
                self._set(f"rank {self._rank}", call=call, word=self._word, said=own)
                called, wait, left_out = call, Wait(PATIENCE), Wait(GRACE)
            answer = self._get("answer")
            if called and answer.get("call") == called:
                if answer["words"].get(str(self._rank)) == self._word:
                    text: str = answer["said"]
                    return text
                # Its word would be in the answer, had it been there when rank 0 asked.
                if left_out.over and (why := self._left_out()):
                    raise AutoglmError(why, hint="restart all ranks of the launch together")
            wait.pause(f"rank {self._rank} waits for rank 0", self.board)

    def _get(self, name: str) -> dict[str, Any]:
        text = self.board.get(name)
        found = json.loads(text) if text else {}
        if isinstance(found, dict) and found.get("launch") == self._launch:
            return found
        return {}

    def _set(self, name: str, **said: Any) -> None:
        self.board.set(name, json.dumps({"launch": self._launch, **said}))


class Wait:
    """A wait for others that a person is told of, and that ends."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._said = False

    @property
    def over(self) -> bool:
        """Whether it has been too long."""
        return time.monotonic() - self._began > self._seconds

    def pause(self, what: str, where: object) -> None:
        """A little. Raises AutoglmError when it has been too long."""
        if self.over:
            raise AutoglmError(
                f"{what}, in {where}: nothing came in {self._seconds:.0f} s",
                hint="start all ranks, with one directory of checkpoints that they share",
            )
        if time.monotonic() - self._began > SAY and not self._said:
            self._said = True
            output.say(f"{what}, in {where}")
        time.sleep(PAUSE)


def launch_of(environment: Mapping[str, str]) -> str:
    """What is known of the launch that a process is of; empty if nothing."""
    # Parts of a heterogeneous job of Slurm have ids of their own.
    unlike = ("SLURM_JOB_ID", "SLURM_STEP_ID") if "SLURM_HET_SIZE" in environment else ()
    return " ".join(environment.get(name, "") for name in _SHARED if name not in unlike).strip()
