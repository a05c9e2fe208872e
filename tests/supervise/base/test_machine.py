from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pynvml  # type: ignore[import-untyped]
import pytest

from autoglm_resume.errors import UsageError
from autoglm_resume.supervise.base import machine

LISTEN = """
import signal, socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
signal.pause()
"""


def test_a_taken_port_names_who_has_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", LISTEN], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    with pytest.raises(UsageError) as caught:
        machine.free_port(port)
    assert f"port {port} to be free" in caught.value.message
    assert f"in use by process {process.pid} (python" in caught.value.message
    process.kill()
    process.communicate()
    assert machine.free_port(port) == port


def test_a_port_of_finished_connections_is_free() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()  # this side waits out TIME_WAIT
    client.close()
    server.close()
    assert machine.free_port(port) == port


def test_fresh_ports_can_be_listened_on() -> None:
    for _ in range(5):
        port = machine.free_port()
        socket.create_server(("", port)).close()


def test_a_port_that_needs_root_is_not_said_to_be_in_use() -> None:
    if (
        os.geteuid() != 0
        or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 81
    ):
        pytest.skip("needs root, to stop being it")
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            machine.free_port(81)
        except UsageError as error:
            os._exit(1 if "in use" in error.message else 0)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", 0),
        ("0", 1),
        ("0,1,2", 3),
        (" 3 , 5", 2),
        ("-1", 0),
        ("0,-1,2", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("0,,2", 1),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_take(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert machine.visible_gpus() == expected


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    assert machine.visible_gpus() == found


def test_the_driver_is_asked_once_as_a_gpu_that_fails_may_take_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    machine._gpus.cache_clear()
    assert machine.visible_gpus() == 2
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: pytest.fail("asked again"))
    assert machine.visible_gpus() == 2
    machine._gpus.cache_clear()


def test_a_driver_that_does_not_answer_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = threading.Event()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER_PATIENCE", 0.01)
    monkeypatch.setattr(pynvml, "nvmlInit", silent.wait)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    machine._gpus.cache_clear()
    assert machine.visible_gpus() == 0
    silent.set()
    machine._gpus.cache_clear()


def test_a_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    machine.check_directory(tmp_path / "a" / "b", 1)
    machine.check_directory(tmp_path / "a" / "b", 1)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(UsageError, match=r"checkpoint\.dir") as caught:
            machine.check_directory(path, 1)
        assert str(path) in caught.value.message
    with pytest.raises(UsageError, match="Not a directory"):
        machine.check_directory(tmp_path / "a" / "b", 1)


def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        with pytest.raises(UsageError, match="Permission denied"):
            machine.check_directory(tmp_path / "x", 1)
        tmp_path.chmod(0o755)
        return
    with pytest.raises(UsageError, match="expected a directory that this user can write to"):
        machine.check_directory(Path("/proc/self/nothing"), 1)


def test_a_directory_that_is_too_full_says_how_much_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        machine.check_directory(tmp_path, 1 << 60)
    assert "guards.free_disk" in caught.value.message
    assert f"at least {2**30:.2f} GiB free, found " in caught.value.message


def test_the_state_of_a_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import signal; print(flush=True); signal.pause()"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert machine.state(process.pid) == "stopped"
    process.kill()
    process.communicate()
    assert machine.state(process.pid) == ""
