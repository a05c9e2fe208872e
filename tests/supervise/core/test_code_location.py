from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_resume.supervise.core.code_location import last_raised, of_stack, of_traceback, waits

TORCH = "/venv/lib/python3.11/site-packages/torch"


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (
            f"""Traceback (most recent call last):
  File "/home/me/train.py", line 40, in <module>
    loop()
  File "/home/me/train.py", line 31, in step
    loss.backward()
  File "{TORCH}/_tensor.py", line 630, in backward
    torch.autograd.backward(
RuntimeError: bad
""",
            "train.py:31 in step",
        ),
        ('  File "/home/me/train.py", line 40, in <module>\nValueError: bad', "train.py:40"),
        # A script that does not compile has a line, but no function.
        ('  File "/home/me/train.py", line 3\n    def f(:\nSyntaxError: bad', "train.py:3"),
        # What the data loader passes on has the dataset's own frame last.
        (
            f"""Traceback (most recent call last):
  File "/home/me/train.py", line 40, in <module>
  File "{TORCH}/utils/data/dataloader.py", line 733, in __next__
ValueError: Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "{TORCH}/utils/data/_utils/fetch.py", line 54, in fetch
  File "/home/me/images.py", line 12, in __getitem__
    raise ValueError("sample is broken")
ValueError: sample is broken
""",
            "images.py:12 in __getitem__",
        ),
        # Nothing of the user's: the innermost of all.
        (
            f'  File "{TORCH}/serialization.py", line 9, in load\nEOFError',
            "serialization.py:9 in load",
        ),
        ('  File "/src/torch/nn/modules/linear.py", line 9, in forward', "linear.py:9 in forward"),
        ("KeyError: 'x'", ""),
        ("", ""),
    ],
)
def test_a_traceback_happened_at_the_users_innermost_line(trace: str, expected: str) -> None:
    assert of_traceback(trace) == expected


WAITING = (
    f"{TORCH}/autograd/graph.py:865 in _engine_run_backward",
    f"{TORCH}/_tensor.py:630 in backward",
    "/home/me/train.py:88 in step",
    "/home/me/train.py:99 in <module>",
)
SLEEPING = ("/home/me/train.py:90 in step", "/home/me/train.py:99 in <module>")


def test_a_stack_is_at_the_users_innermost_line() -> None:
    assert of_stack(WAITING) == "train.py:88 in step"
    assert of_stack(SLEEPING) == "train.py:90 in step"
    assert of_stack(()) == of_stack(("not a frame",)) == ""


def test_who_is_in_a_collective_waits() -> None:
    assert waits(WAITING)
    assert waits((f"{TORCH}/distributed/distributed_c10d.py:2 in all_reduce", *SLEEPING))
    assert not waits(SLEEPING)
    assert not waits((f"{TORCH}/utils/data/dataloader.py:9 in __next__", *SLEEPING))
    assert not waits(())


TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'
OOM = f"{TRACE}torch.OutOfMemoryError: CUDA out of memory.\nTried"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            f"{TRACE}KeyError: 'a'\nepoch 2\n{OOM}\n",
            ("OutOfMemoryError", "CUDA out of memory.\nTried", f"{OOM}\n"),
        ),
        # What fails at the interpreter's end is not what ended the script.
        (
            f"{OOM}\nException ignored in atexit callback: <function x>\n{TRACE}OSError: no\n",
            ("OutOfMemoryError", "CUDA out of memory.\nTried", OOM),
        ),
        (f"{TRACE}KeyboardInterrupt\n", ("KeyboardInterrupt", "", f"{TRACE}KeyboardInterrupt\n")),
        (TRACE, None),
        ("ValueError: bad\n", None),
    ],
)
def test_the_exception_that_a_log_ends_with_is_found(
    log: str, expected: tuple[str, str, str] | None
) -> None:
    assert last_raised(log) == expected


@given(st.text(max_size=200), st.lists(st.text(max_size=50), max_size=4))
def test_no_text_is_too_strange(text: str, stack: list[str]) -> None:
    of_traceback(text)
    last_raised(text)
    of_stack(stack)
    waits(stack)
