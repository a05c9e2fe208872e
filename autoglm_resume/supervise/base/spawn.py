"""Starting a process that works beside the ranks: zygote, saver, replicator, messenger."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from autoglm_resume.protocol.assignment import HOME


def start(
    module: str, arguments: Iterable[str], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """`python -m module FD argument…` in a session of its own, and the other end of the socket FD.

    What it prints is appended to `log`. Raises OSError, with nothing left open.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                cwd=HOME,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
    except OSError:
        ours.close()
        raise
    return process, ours
