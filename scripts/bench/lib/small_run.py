"""One run of the small script (train_small.py) under autoglm, from outside."""

from __future__ import annotations

import json
import signal
from typing import Any

from lib import common


class Run:
    """A run of `steps` steps in a directory of its own; `start` begins it, or goes on with it."""

    def __init__(self, name: str, steps: int, checkpoint: dict[str, Any], *words: str) -> None:
        """`checkpoint` is that section of the job; `words` are more arguments of the script."""
        self.steps = steps
        self.words = words
        self.checkpoint = checkpoint
        self.directory = common.fresh_directory(f"exactness/{name}")
        self.journal = common.Lines(self.directory / "run" / "events.jsonl")
        self.output = self.directory / "output"
        self.checkpoints = self.directory / "run" / "checkpoints"
        self.ranks = 0

    def start(self, ranks: int, **fields: Any) -> None:
        """With so many ranks, and more fields of the job."""
        self.ranks = ranks
        job = common.write_job(
            self.directory,
            script=str(common.SCRIPTS / "train_small.py"),
            args=[f"--output={self.directory}", f"--steps={self.steps}", *self.words],
            nproc_per_node=ranks,
            checkpoint=self.checkpoint,
            **fields,
            restart={
                "max_restarts": 10_000,
                "without_progress": 10_000,
                "backoff": 0,
                "max_backoff": 0,
            },
        )
        self.process = common.spawn([*common.autoglm(), "run", str(job)], self.output)

    def attempts(self) -> list[dict[str, Any]]:
        """Every attempt that was started so far."""
        self.journal.new()
        return [event for event in self.journal.all if event["event"] == "attempt_started"]

    def next_attempt(self, after: int) -> dict[str, Any]:
        """The first attempt after number `after`, as soon as it is there. Raises Stuck."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [a for a in self.attempts() if a["attempt"] > after]
            return bool(found)

        common.wait_for(there, f"attempt {after + 1}", self.process, self.output)
        return found[0]

    def end(self) -> None:
        """Kill it, if it still runs."""
        if self.ranks:
            common.end(self.process)

    def stop(self, how: signal.Signals, expected: int) -> None:
        """Send its supervisor a signal. Raises Stuck unless it ends with that exit code."""
        self.process.send_signal(how)
        self.finish(expected)

    def finish(self, expected: int = 0) -> None:
        """Wait for its end. Raises Stuck if that is not the expected one."""
        common.wait_for(
            lambda: self.process.poll() is not None, "the end", self.process, self.output, 300
        )
        if self.process.returncode != expected:
            tail = self.output.read_text(errors="replace")[-3000:]
            raise common.Stuck(f"the run ended with exit code {self.process.returncode}\n{tail}")
        self.journal.new()

    # What it came to

    def objects(self) -> dict[str, str]:
        """Digests of everything in the final checkpoint, from the journal."""
        objects = self.journal.all[-1]["objects"]
        assert isinstance(objects, dict)
        return objects

    def in_memory(self) -> dict[int, dict[str, str]]:
        """SHA-256 of what each rank held at its end."""
        return self._held("final", self.ranks)

    def resumed(self, attempt: int, ranks: int) -> dict[int, dict[str, str]]:
        """SHA-256 of what each rank held when it began that attempt."""
        return self._held(f"resumed-{attempt}", ranks)

    def _held(self, when: str, ranks: int) -> dict[int, dict[str, str]]:
        paths = {rank: self.directory / f"{when}-{rank}.json" for rank in range(ranks)}
        return {rank: json.loads(path.read_text()) for rank, path in paths.items()}

    def loaded(self, id: str | None = None) -> dict[int, dict[str, str]]:
        """SHA-256 of what each rank that made it would load from a checkpoint, else the newest."""
        from autoglm_resume.checkpoint.state import restore
        from autoglm_resume.checkpoint.store.store import Store
        from scripts.train_small import sha256

        store = Store(self.checkpoints)
        path = store.directory(id) if id else store.latest()
        assert path is not None
        found = {}
        for rank in range(store.load_manifest(path).world_size):
            states = restore.read(store, path, rank).states
            found[rank] = {name: sha256(states[name]) for name in ("model", "optimizer")}
        return found

    def samples(self) -> dict[tuple[int, int], list[int]]:
        """Samples consumed by the kept steps, by step and rank."""
        return {(line["step"], line["rank"]): line["samples"] for line in self.kept()}

    def kept(self) -> list[dict[str, Any]]:
        """What the ranks wrote down of the kept steps.

        A step is kept from the last attempt that started at or before it: later ones went on from
        a checkpoint that has it.
        """
        starts = {event["attempt"]: event["step"] for event in self.attempts()}
        lines = common.Lines(self.directory / "samples.jsonl").new()
        last = {n: max(a for a, start in starts.items() if start <= n) for n in range(self.steps)}
        return [line for line in lines if line["attempt"] == last[line["step"]]]
