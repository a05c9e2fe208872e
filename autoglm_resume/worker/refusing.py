"""What autoglm refuses and no script catches: a sentence, what to do, and an exit code of its own.

Where in our code it was raised helps nobody; which line of the script asked for it does.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import autoglm_resume
from autoglm_resume import output
from autoglm_resume.errors import AutoglmError

_HOME = str(Path(autoglm_resume.__file__).parent) + os.sep
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", "<")


def is_refusal(error: BaseException | None) -> bool:
    """Whether it is an error of ours that our own code has raised."""
    if not isinstance(error, AutoglmError):
        return False
    files = _files(error.__traceback__)
    return bool(files) and files[-1][0].startswith(_HOME)


def told(error: AutoglmError) -> str:
    """The sentence, with the line of the script that it is about, and below it what to do."""
    files = _files(error.__traceback__)
    others = [(file, line) for file, line in files if not file.startswith(_HOME)]
    own = [each for each in others if not any(part in each[0] for part in _LIBRARIES)]
    at = f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""
    hint = f"\nhint: {error.hint}" if error.hint else ""
    return f"error: {error.message}{at}{hint}"


def speak_alone(ended: Callable[[AutoglmError], None]) -> None:
    """Tell refusals so where nobody does it for this process; other errors are told as before.

    `ended` is to see to the exit code: this may be called by a hook that lets no SystemExit pass.
    """
    before = sys.excepthook
    if getattr(before, "of_autoglm", False) or hasattr(sys, "ps1") or sys.flags.interactive:
        return

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, AutoglmError) and is_refusal(error):
            for line in told(error).split("\n"):
                output.say(line)
            ended(error)
        else:
            before(kind, error, trace)

    tell.of_autoglm = True  # type: ignore[attr-defined]
    sys.excepthook = tell


def _files(trace: TracebackType | None) -> list[tuple[str, int | None]]:
    return [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(trace)]
