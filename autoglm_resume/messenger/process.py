"""The process that tells people: started with the run, at low priority, by the supervisor.

It reads events from a socket until that ends, and then has a few seconds for what is left. A
webhook that hangs, or a command that never ends, holds up only what the same target is told next.

Usage: python -m autoglm_resume.messenger.process SOCKET_FD WORKDIR
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

from autoglm_resume import events, linux, output
from autoglm_resume.job.secret import mask
from autoglm_resume.observe.pure.notify import Context, Message, after, died, message

WEBHOOK_SECONDS = 10.0
COMMAND_SECONDS = 30.0
TRIES = 3
BACKOFF = 2.0
"""Seconds before the second try; doubles."""
QUEUE = 100
"""Messages that wait for one target; beyond them the oldest is dropped."""
FLUSH_SECONDS = 4.5
"""For what is left when the supervisor has ended, which waits a little longer than this."""


class Undelivered(Exception):
    """A try that failed; the text says why, without the address."""


class Recipient:
    """One who is told, with a thread and a queue of its own."""

    def __init__(self, link: socket.socket, config: dict[str, Any], workdir: str) -> None:
        self.on = frozenset(config["on"])
        self._link = link
        self._webhook: str | None = config.get("webhook")
        self._command: str | list[str] | None = config.get("command")
        self._workdir = workdir
        self._waiting: deque[bytes] = deque(maxlen=QUEUE)
        self._changed = threading.Condition()
        self._ending: float | None = None
        """Monotonic time by which all must be over."""
        self._broken = False
        self._process: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._deliver_all, daemon=True)
        self.thread.start()

    @property
    def name(self) -> str:
        """What may be shown of it."""
        if self._webhook is not None:
            return mask(self._webhook)
        words = self._command.split() if isinstance(self._command, str) else self._command or [""]
        return f"command {words[0]}"

    def tell(self, told: Message) -> None:
        """Queue a message, if it wants it."""
        if told.on in self.on:
            with self._changed:
                self._waiting.append(json.dumps(self._safe(told.body)).encode())
                self._changed.notify()

    def _safe(self, body: dict[str, Any]) -> dict[str, Any]:
        """What an exception says must neither turn a terminal's text nor ring a whole channel."""
        plain = {k: output.lines(v) if isinstance(v, str) else v for k, v in body.items()}
        if self._webhook is not None:
            # https://api.slack.com/reference/surfaces/formatting: `<!channel>` is a mention.
            for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
                plain["text"] = plain["text"].replace(character, entity)
        return plain

    def end(self, deadline: float) -> None:
        """Deliver what is left until monotonic time `deadline`, then no more."""
        with self._changed:
            self._ending = deadline
            self._changed.notify()

    def give_up(self) -> None:
        """Time is up: say so if something is left, and end a command that is still running."""
        if self.thread.is_alive():
            self._report("it took longer than the end of the run could wait")
        self._kill()

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _deliver_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending is not None)
                if not self._waiting:
                    return
                body = self._waiting.popleft()
            self._deliver(body)

    def _deliver(self, body: bytes) -> None:
        for attempt in range(TRIES):
            try:
                if self._webhook is not None:
                    self._post(body)
                else:
                    self._run(body)
            except Undelivered as error:
                reason = str(error)
            except Exception as error:  # its text may hold the address
                reason = f"it failed with {type(error).__name__}"
            else:
                self._broken = False
                return
            if attempt < TRIES - 1:
                self._pause(BACKOFF * 2**attempt)
        self._report(reason)

    def _report(self, reason: str) -> None:
        """Once, until it works again."""
        if not self._broken:
            self._broken = True
            said = json.dumps({"target": self.name, "reason": reason[:500]})
            with contextlib.suppress(OSError):
                self._link.send(said.encode())

    def _pause(self, duration: float) -> None:
        with self._changed:
            if self._ending is None:
                self._changed.wait_for(lambda: self._ending is not None, duration)
            else:
                self._changed.wait(min(duration, 0.5))

    def _patience(self, longest: float) -> float:
        return longest if self._ending is None else max(0.1, self._ending - time.monotonic())

    def _post(self, body: bytes) -> None:
        # 40 ms and more, which only who needs it should pay; and only here, beside the training.
        import http.client
        import urllib.error
        import urllib.request

        assert self._webhook is not None
        url = os.path.expandvars(self._webhook)
        if not url.startswith(("http://", "https://")):
            raise Undelivered(f"expected the variable {self._webhook} to hold an address")
        headers = {"Content-Type": "application/json", "User-Agent": "autoglm"}
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            with urllib.request.urlopen(request, timeout=self._patience(WEBHOOK_SECONDS)) as reply:
                reply.read(1024)
        except urllib.error.HTTPError as error:
            # What it says itself may hold an address it redirects to.
            said = http.client.responses.get(error.code, "")
            raise Undelivered(f"it answered {error.code} {said}") from None
        except urllib.error.URLError as error:
            raise Undelivered(str(error.reason)) from None
        except OSError as error:
            raise Undelivered(str(error)) from None
        except (ValueError, http.client.InvalidURL):
            # What is wrong with an address is said with the address.
            raise Undelivered("its address cannot be used") from None
        except http.client.HTTPException:
            raise Undelivered("its answer is no HTTP") from None

    def _run(self, body: bytes) -> None:
        assert self._command is not None
        try:
            self._process = subprocess.Popen(
                self._command,
                shell=isinstance(self._command, str),
                cwd=self._workdir,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise Undelivered(f"could not be started: {error.strerror}") from None
        try:
            self._process.communicate(body + b"\n", timeout=self._patience(COMMAND_SECONDS))
        except subprocess.TimeoutExpired:
            raise Undelivered(f"did not end within {COMMAND_SECONDS:.0f} s") from None
        finally:
            self._kill()
            self._process.wait()
            code, self._process = self._process.returncode, None
        if code:
            raise Undelivered(f"exited with {code}; see notify.log")


def main(fd: int, workdir: str) -> None:
    """Tell until the socket ends, and a little longer."""
    linux.stand_back()
    link = socket.socket(fileno=fd)
    targets: list[Recipient] = []
    context: Context | None = None
    while data := link.recv(1 << 20):
        said = json.loads(data)
        if "target" in said:
            targets.append(Recipient(link, said["target"], workdir))
        elif "about" in said:
            context = Context(**said["about"])
        elif context is not None:
            event = events.read(said["event"])
            told, context = message(event, context), after(event, context)
            for target in targets if told else ():
                target.tell(told)  # type: ignore[arg-type]
    deadline = time.monotonic() + FLUSH_SECONDS
    last = died(context, time.time()) if context is not None else None
    for target in targets:
        if last is not None:
            target.tell(last)
        target.end(deadline)
    for target in targets:
        target.thread.join(max(0.0, deadline - time.monotonic()))
        target.give_up()
    os._exit(0)  # a thread in a connection that hangs cannot be ended otherwise


if __name__ == "__main__":
    output.begin(noting=True)
    main(int(sys.argv[1]), sys.argv[2])
