"""Whether storage answers, asked by child processes: a dead mount hangs whoever touches it."""

from __future__ import annotations

import contextlib
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from autoglm_resume.supervise.core.checks import StorageAnswer

SECONDS = 10.0

# Without any import of ours, which takes time. The directory itself may not be there yet; that of a
# replica may not be made, because it may be a mount that is missing.
_DIRECTORY = """
import os, sys
path, replica = sys.argv[1:]
while not os.path.exists(path):
    if replica:
        sys.exit("there is no such directory: make it, or mount it")
    path = os.path.dirname(path)
os.listdir(path)
if not os.access(path, os.W_OK | os.X_OK):
    sys.exit(f"{path}: this user may not write there")
"""
_BUCKET = """
import sys
from autoglm_resume.checkpoint.storage.storage import open_storage
open_storage(sys.argv[1], "autoglm-doctor").names()
"""


class StorageProbe:
    """Asks all targets at once; `answers` waits for them, for a bounded time."""

    def __init__(
        self,
        targets: Sequence[str],
        replicas: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._began = time.monotonic()
        wanted = [*((target, False) for target in targets), *((each, True) for each in replicas)]
        self._asked = [
            (target, replica, _ask(target, replica, environment)) for target, replica in wanted
        ]

    @property
    def pids(self) -> frozenset[int]:
        """Of children that hang in the kernel: they cannot be ended, and nobody may wait for it."""
        return frozenset(process.pid for *_, process in self._asked if process.poll() is None)

    def answers(self, within: float = SECONDS) -> tuple[StorageAnswer, ...]:
        """What each said."""
        deadline = self._began + within
        ended: dict[int, float] = {}
        texts = [b"" for _ in self._asked]
        with selectors.DefaultSelector() as selector:
            for n, (*_, process) in enumerate(self._asked):
                assert process.stderr is not None
                selector.register(process.stderr, selectors.EVENT_READ, n)
            while selector.get_map() and (rest := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(rest):
                    data = key.fileobj.read1()  # type: ignore[union-attr]
                    texts[key.data] += data
                    if not data:
                        selector.unregister(key.fileobj)
                        ended[key.data] = time.monotonic() - self._began
        places = []
        for n, (target, replica, process) in enumerate(self._asked):
            if n in ended:
                error = _error(process, texts[n])
            else:
                error = f"no answer within {within:.0f} s"
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            assert process.stderr is not None
            process.stderr.close()
            places.append(
                StorageAnswer(target, error, ended.get(n, within), replica, n not in ended)
            )
        return tuple(places)


def _ask(
    target: str, replica: bool, environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    directory = target.startswith("/")
    how = ["-I", "-S", "-c", _DIRECTORY] if directory else ["-c", _BUCKET]
    return subprocess.Popen(
        [sys.executable, *how, target, "replica" if replica else ""],
        env=None if environment is None else dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _error(process: subprocess.Popen[bytes], said: bytes) -> str:
    if process.wait() == 0:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else f"its probe ended with {process.returncode}"
