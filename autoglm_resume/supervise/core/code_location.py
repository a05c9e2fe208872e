"""Where in the user's own code something happened: from tracebacks and stacks. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TRACE = re.compile(r'^\s*File "(.+?)", line (\d+)(?:, in (.+))?$', re.MULTILINE)
_STACK = re.compile(r"^(.+):(\d+) in (.+)$")
_RAISED = re.compile(
    r"^Traceback \(most recent call last\):\n(?:^ .*\n)*^([A-Za-z_][\w.]*)(?:: |$)", re.M
)
_IGNORED = re.compile(r"^Exception ignored in.*\n\Z", re.MULTILINE)
"""Handlers at the interpreter's end may fail because the script did."""
_LIBRARY = re.compile(
    r"/(?:site|dist)-packages/|/lib(?:64)?/python\d|/autoglm_resume/(?:worker|protocol|checkpoint|integrations)/|^<"
    r"|/torch/(?:nn|distributed|autograd|utils|optim|_dynamo|_inductor|multiprocessing)/"
)
_WAITING = re.compile(r"/torch/(?:distributed|autograd|nn/parallel|cuda)/")


def of_traceback(text: str) -> str:
    """“train.py:31 in step”: the innermost frame of a formatted exception that is the user's.

    The innermost of all if none is; empty without any. Errors of data loaders carry the worker's
    traceback within their message, so the frame of the dataset is found.
    """
    return _innermost(_TRACE.findall(text)[::-1])


def of_stack(stack: Sequence[str]) -> str:
    """The same of a stack, “file:line in function”, innermost first."""
    return _innermost([frame for text in stack for frame in _STACK.findall(text)])


def waits(stack: Sequence[str]) -> bool:
    """Whether it is in a collective or a backward pass below the user's innermost frame."""
    for frame in stack:
        if _WAITING.search(frame):
            return True
        if not _LIBRARY.search(frame):
            return False
    return False


def last_raised(log: str) -> tuple[str, str, str] | None:
    """Type, message and traceback of the exception that a log ends with, if it does."""
    found = [m for m in _RAISED.finditer(log) if not _IGNORED.search(log[: m.start()])]
    if not found:
        return None
    last = found[-1]
    end = log.find("\nException ignored in", last.end())
    text = log[last.start() : end if end >= 0 else None]
    return last[1].rpartition(".")[2], text[last.end() - last.start() :].strip(), text


def _innermost(frames: Sequence[tuple[str, str, str]]) -> str:
    """Of frames that begin with the innermost."""
    own = [frame for frame in frames if not _LIBRARY.search(frame[0])]
    for path, line, function in own or frames:
        name = f"{path.rpartition('/')[2]}:{line}"
        return name if function in ("", "<module>") else f"{name} in {function}"
    return ""
