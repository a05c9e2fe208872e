"""The real process that tells people, with real servers and commands that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoglm_resume import events
from autoglm_resume.job.spec import Job
from autoglm_resume.messenger import process
from autoglm_resume.observe.pure.notify import Message
from autoglm_resume.supervise.base.event_loop import EventLoop
from autoglm_resume.supervise.services.notifier import FLUSH_SECONDS, Notifier
from tests.patience import PATIENCE, soon


class Server:
    """A webhook. `behave` says how it answers: a status code, or `hang`."""

    def __init__(self) -> None:
        self.behave: list[int | str] = []
        self.got: queue.Queue[dict[str, Any]] = queue.Queue()
        self.released = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                how = outer.behave.pop(0) if outer.behave else 200
                outer.got.put(json.loads(body))
                if how == "hang":
                    outer.released.wait()
                    return
                self.send_response(int(how))
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/secret"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


class Told:
    """A notifier, and what it told the journal."""

    def __init__(
        self, directory: Path, loop: EventLoop, *targets: dict[str, Any], **env: str
    ) -> None:
        self.journal: list[dict[str, Any]] = []
        self.log = directory / "notify.log"
        job = Job.model_validate(
            {
                **{"name": "demo", "script": "train.py", "workdir": directory},
                **{"run_dir": directory, "checkpoint": {"dir": directory}, "notify": targets},
            }
        )
        self.notifier = Notifier(loop, job, {**os.environ, **env}, directory, self.tell)
        self.notifier.start("r1")

    def tell(self, event: events.Event, /) -> None:
        self.journal.append(events.to_record(event))

    def say(self, event: str, **fields: Any) -> None:
        line = {"event": event, "time": time.time(), "attempt": 0, **fields}
        self.notifier.event(events.read(line))

    def fail(self) -> None:
        self.say("failure", kind="killed", root_rank=1, summary="rank 1 died", step=6)

    def close(self) -> None:
        self.notifier.close(lambda: False)
        assert not self.notifier.pids


@pytest.fixture
def told(tmp_path: Path, loop: EventLoop) -> Iterator[Any]:
    made: list[Told] = []

    def make(*targets: dict[str, Any], **env: str) -> Told:
        made.append(Told(tmp_path, loop, *targets, **env))
        return made[-1]

    yield make
    for each in made:
        each.notifier.close(lambda: True)


def test_a_webhook_gets_text_for_people_and_fields_for_programs(told: Any, server: Server) -> None:
    run = told({"webhook": server.url})
    run.fail()
    body = server.got.get(timeout=PATIENCE)
    assert body["text"].startswith("demo on ")
    assert body["text"].endswith(": rank 1 died (step 6)")
    assert (body["kind"], body["rank"], body["event"]) == ("killed", 1, "failed")
    run.say("run_completed", step=10, seconds=1.0)
    run.close()
    assert server.got.get(timeout=PATIENCE)["event"] == "completed"
    assert run.journal == []


def test_an_address_is_read_from_the_environment(told: Any, server: Server) -> None:
    run = told({"webhook": "$MY_HOOK"}, MY_HOOK=server.url)
    run.fail()
    run.say("run_failed", code=1, reason="spent")
    run.close()
    assert run.journal == []
    assert server.got.get(timeout=PATIENCE)["event"] == "failed"


def test_a_variable_that_is_not_set_is_journaled_by_its_name(told: Any) -> None:
    run = told({"webhook": "$NO_SUCH_HOOK"})
    run.say("run_failed", code=1, reason="spent")
    run.close()
    said = run.journal[-1]
    assert said["target"] == "$NO_SUCH_HOOK"
    assert "expected the variable $NO_SUCH_HOOK" in said["reason"]


def test_only_what_was_asked_for_is_told(told: Any, server: Server) -> None:
    run = told({"webhook": server.url, "on": ["gave_up"]})
    run.fail()
    run.say("run_failed", code=1, reason="spent")
    run.close()
    assert [server.got.get_nowait()["event"] for _ in range(server.got.qsize())] == ["gave_up"]


def test_a_server_that_fails_twice_is_asked_a_third_time(told: Any, server: Server) -> None:
    server.behave = [500, 503]
    run = told({"webhook": server.url})
    run.say("run_failed", code=1, reason="spent")
    run.close()
    assert server.got.qsize() == 3
    assert run.journal == []


def test_a_server_that_keeps_failing_is_journaled_once_and_without_its_address(
    told: Any, server: Server
) -> None:
    server.behave = [500] * 9
    run = told({"webhook": server.url})
    run.fail()
    run.say("run_failed", code=1, reason="spent")
    run.close()
    (said,) = run.journal
    assert said["event"] == "notify_failed"
    assert said["reason"] == "it answered 500 Internal Server Error"
    assert "secret" not in json.dumps(run.journal)
    assert "secret" not in run.log.read_text()


def test_a_server_that_is_not_there_is_journaled(told: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = told({"webhook": f"http://127.0.0.1:{port}/x"})
    run.say("run_failed", code=1, reason="spent")
    run.close()
    (said,) = run.journal
    assert "refused" in said["reason"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/se cret", "its address cannot be used"), ("/secret", "its answer is no HTTP")],
)
def test_what_a_library_says_of_an_address_is_never_passed_on(
    told: Any, path: str, reason: str
) -> None:
    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"/secret\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}{path}"
        run = told({"webhook": "$MY_HOOK"}, MY_HOOK=address)
        run.fail()
        run.say("run_failed", code=1, reason="spent")
        run.close()
        listening.shutdown(socket.SHUT_RDWR)
    (said,) = run.journal
    assert said["reason"] == reason
    assert "cret" not in run.log.read_text()


def test_a_defect_ends_no_thread_and_is_told_by_its_name_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(target: process.Recipient, body: bytes) -> None:
        raise RuntimeError("https://host/secret")

    monkeypatch.setattr(process.Recipient, "_post", broken)
    monkeypatch.setattr(process, "BACKOFF", 0.0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        config = {"webhook": "https://host/secret", "on": ["failed"]}
        target = process.Recipient(theirs, config, str(tmp_path))
        target.tell(Message("failed", {"text": ""}))
        ours.settimeout(PATIENCE)
        said = json.loads(ours.recv(4096))
        assert said == {"target": "https://host/…", "reason": "it failed with RuntimeError"}
        assert target.thread.is_alive()
        target.end(0.0)
        target.thread.join(PATIENCE)


def test_a_report_that_was_cut_is_let_go(told: Any) -> None:
    run = told()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        run.notifier._socket = ours
        for report in (b'{"target": "tru', b'{"target": "a", "reason": "b"}'):
            theirs.send(report)
            run.notifier._readable()
        run.notifier._socket = None
    assert [said["target"] for said in run.journal] == ["a"]


def test_a_server_that_hangs_delays_nobody_else_and_the_end_only_a_little(
    told: Any, server: Server, tmp_path: Path
) -> None:
    server.behave = ["hang"] * 9
    run = told({"webhook": server.url}, {"command": "cat >> told.jsonl"})
    run.fail()
    run.say("run_failed", code=1, reason="spent")
    run.close()
    events = [json.loads(line)["event"] for line in (tmp_path / "told.jsonl").open()]
    assert events == ["failed", "gave_up"]
    # By the messenger or, where that has not come to it, by the supervisor.
    reasons = {said["reason"] for said in run.journal}
    assert reasons == {"it took longer than the end of the run could wait"}


def test_a_command_that_never_ends_is_ended_with_the_run(told: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alive")
    run = told({"command": ["sh", "-c", "exec 3> alive; cat > /dev/null; sleep 1234.5"]})
    run.say("run_failed", code=1, reason="spent")
    with (tmp_path / "alive").open() as alive:
        run.close()
        assert alive.read() == ""  # nobody holds the other end any more
    assert run.journal


@pytest.mark.parametrize(
    ("command", "target", "reason"),
    [
        (["no-such-command", "--key", "secret"], "command no-such-command", "No such file"),
        ("exit 3 # secret", "command exit", "exited with 3"),
    ],
)
def test_a_command_that_fails_is_journaled_by_its_first_word(
    told: Any, command: Any, target: str, reason: str
) -> None:
    run = told({"command": command})
    run.say("run_failed", code=1, reason="spent")
    run.close()
    (said,) = run.journal
    assert said["target"] == target
    assert reason in said["reason"]
    assert "secret" not in json.dumps(said)


def test_a_supervisor_that_dies_is_told(told: Any, server: Server) -> None:
    run = told({"webhook": server.url})
    run.say("committed", id="x", step=40)
    run.close()
    assert "continues from step 40" in server.got.get(timeout=PATIENCE)["text"]


def test_a_process_that_was_killed_is_started_again_for_the_next_message(
    told: Any, server: Server, loop: EventLoop
) -> None:
    run = told({"webhook": server.url})
    (pid,) = run.notifier.pids
    os.kill(pid, 9)
    assert loop.wait(lambda: not run.notifier.pids, soon())
    run.fail()
    assert run.notifier.pids != {pid}
    assert server.got.get(timeout=PATIENCE)["event"] == "failed"


def test_a_process_that_does_not_read_costs_the_supervisor_nothing(told: Any) -> None:
    run = told({"command": ["true"]})
    (pid,) = run.notifier.pids
    os.kill(pid, 19)
    for _ in range(5000):
        run.fail()
    run.notifier.close(lambda: True)


def test_long_texts_are_cut_rather_than_lost(told: Any, server: Server) -> None:
    run = told({"webhook": server.url})
    run.say("failure", kind="x" * 9000, summary="ä" * 9000, place="€" * 9000, step=1)
    assert "ä" in server.got.get(timeout=PATIENCE)["text"]


def test_what_an_exception_says_is_a_text_and_no_order(told: Any, server: Server) -> None:
    run = told({"webhook": server.url})
    run.say("failure", kind="x", summary="<!channel> \x1b[2J\u202egnp.exe & more", step=1)
    body = server.got.get(timeout=PATIENCE)
    assert body["text"].endswith(": &lt;!channel&gt; gnp.exe &amp; more (step 1)")
    assert body["reason"] == "<!channel> gnp.exe & more"


def test_nobody_to_tell_starts_nothing(told: Any) -> None:
    run = told()
    run.fail()
    assert not run.notifier.pids


def test_the_end_waits_longer_than_the_process_does() -> None:
    from autoglm_resume.messenger import process

    assert process.FLUSH_SECONDS < FLUSH_SECONDS


def test_an_address_that_no_variable_holds_is_said_at_the_start(
    tmp_path: Path, loop: EventLoop
) -> None:
    targets = [{"webhook": f"${name}"} for name in ("SET", "{MISSING}", "EMPTY")]
    told = Told(tmp_path, loop, *targets, {"command": "true"}, SET="http://x", EMPTY="")
    told.close()
    warned = [said["text"] for said in told.journal if said["event"] == "warning"]
    assert [text.split(", so")[0] for text in warned] == [
        "notify: ${MISSING} is not set",
        "notify: $EMPTY is not set",
    ]
