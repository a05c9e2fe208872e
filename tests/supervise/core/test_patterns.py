from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.failures import Kind
from autoglm_resume.supervise.core.patterns import (
    TABLE,
    XIDS,
    Pattern,
    Xid,
    explain,
    faulted,
    in_log,
    match,
    notable,
    oom_victim,
    xid,
)
from tests.supervise.core.messages import EXCEPTIONS, LINES


@pytest.mark.parametrize(
    ("type", "message", "kind"), EXCEPTIONS, ids=lambda v: str(getattr(v, "value", v))[:40]
)
def test_an_exception_is_what_its_message_says(type: str, message: str, kind: Kind) -> None:
    found = explain(type, message, early=True)
    assert found is not None
    assert found.kind is kind
    assert found.victim == (kind is Kind.COMMUNICATION)


@pytest.mark.parametrize(("line", "kind"), LINES, ids=lambda v: str(getattr(v, "value", v))[:40])
def test_a_line_of_a_log_is_what_it_says(line: str, kind: Kind) -> None:
    log = f"epoch 1\nstep 40 loss 2.1\n{line}\nFatal Python error: Aborted\n\nThread 0x1:\n"
    found = in_log(log, early=True)
    assert found is not None
    assert (found[0].kind, found[1]) == (kind, line.strip())


@pytest.mark.parametrize(
    "regex", [regex for row in TABLE for regex in row.regexes], ids=lambda regex: regex.pattern
)
def test_every_pattern_has_a_real_message(regex: re.Pattern[str]) -> None:
    texts = [f"{type}: {message}" for type, message, _ in EXCEPTIONS] + [line for line, _ in LINES]
    assert any(regex.search(text) for text in texts)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.means)
def test_every_row_is_reached(row: Pattern) -> None:
    texts = [f"{type}: {message}" for type, message, _ in EXCEPTIONS] + [line for line, _ in LINES]
    assert any(match(text, early=True) is row for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: bad",
        "KeyError: 'image'",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/x'",
        "AssertionError: Torch not compiled with CUDA enabled",
        "RuntimeError: Expected all tensors to be on the same device, but got index is on cuda:0",
        "KeyboardInterrupt: ",
        "",
    ],
)
def test_what_no_row_knows_is_left_open(text: str) -> None:
    assert match(text, early=True) is None


def test_an_import_that_fails_after_the_first_step_is_not_about_the_start() -> None:
    assert explain("ImportError", "No module named 'x'", early=False) is None


def test_the_cause_that_an_exception_was_raised_from_says_more_than_the_exception() -> None:
    trace = """Traceback (most recent call last):
  File "/home/me/train.py", line 5, in step
    next(batches)
RuntimeError: DataLoader worker (pid 32025) is killed by signal: Killed. \n
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/me/train.py", line 9, in <module>
RuntimeError: DataLoader worker (pid(s) 32025) exited unexpectedly
"""
    found = explain(
        "RuntimeError", "DataLoader worker (pid(s) 32025) exited unexpectedly", trace, early=False
    )
    assert found is not None
    assert found.kind is Kind.KILLED


def test_an_exception_that_was_being_handled_is_not_the_cause() -> None:
    trace = """Traceback (most recent call last):
ModuleNotFoundError: No module named 'flash_attn'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
ValueError: bad
"""
    assert explain("ValueError", "bad", trace, early=True) is None


def test_a_data_set_that_fails_without_worker_processes_is_a_data_error() -> None:
    trace = """Traceback (most recent call last):
  File "/home/me/train.py", line 31, in <module>
  File "/venv/lib/python3.11/site-packages/torch/utils/data/_utils/fetch.py", line 54, in fetch
  File "/home/me/data.py", line 9, in __getitem__
KeyError: 'image'
"""
    found = explain("KeyError", "'image'", trace, early=False)
    assert found is not None
    assert found.kind is Kind.DATA_ERROR


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "NVRM: Xid (PCI:0000:44:00): 79, pid=1122, GPU has fallen off the bus.",
            Xid("0000:44:00", 79, 1122),
        ),
        (
            "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus.",
            Xid("0000:44:00", 79, None),
        ),
        (
            "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping",
            Xid("0000:10:1c", 63, 1896),
        ),
        (
            "NVRM: Xid (PCI:0000:3b:00): 94, pid='<unknown>', name=<unknown>, Contained: SM",
            Xid("0000:3b:00", 94, None),
        ),
        ("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", Xid("0000:01:00", 79, None)),
        # A program's own doing.
        (
            "NVRM: Xid (PCI:0000:00:06): 31, pid=79749, name=exe, Ch 0000000a, MMU Fault: ENGINE "
            "GRAPHICS",
            None,
        ),
        ("eth0: link up", None),
    ],
)
def test_the_kernel_names_broken_gpus(line: str, expected: Xid | None) -> None:
    assert xid(line) == expected
    assert notable(line) == (expected is not None)


KILLED = [
    "Memory cgroup out of memory: Killed process 25266 (python) total-vm:323824kB, "
    "anon-rss:306304kB, file-rss:6640kB, shmem-rss:0kB, UID:0 pgtables:656kB oom_score_adj:0",
    "Out of memory: Killed process 25266 (python3) total-vm:11964kB, anon-rss:4288kB",
]


@pytest.mark.parametrize("line", KILLED)
def test_the_kernel_names_whom_it_killed_for_memory(line: str) -> None:
    assert oom_victim(line) == 25266
    assert notable(line)
    assert oom_victim("oom_reaper: reaped process 25266 (python3), now anon-rss:0kB") is None


def test_the_kernel_names_crashed_processes() -> None:
    line = "python[1234]: segfault at 0 ip 00007f1 sp 00007ffd error 4 in libtorch_cpu.so[7f+1]"
    assert faulted(line) == 1234
    assert faulted("traps: python[77] trap invalid opcode ip:7f sp:7f error:0 in lib.so[7f]") == 77
    assert notable(line)


def test_programs_own_gpu_errors_are_no_faults_of_the_gpu() -> None:
    assert not {13, 31, 43, 45} & XIDS.keys()


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300), st.booleans())
def test_no_text_breaks_the_table(type: str, message: str, trace: str, early: bool) -> None:
    found = explain(type, message, trace, early=early)
    assert found is None or found in TABLE
    in_log(message, early=early)
    notable(message)
