"""What every command has in common: it returns its exit code, and no error of a person's making
shows a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from autoglm_resume import output
from autoglm_resume.errors import AutoglmError, died_by_signal
from autoglm_resume.job.secret import without_logins

P = ParamSpec("P")


def guarded(command: Callable[P, int]) -> Callable[P, None]:
    """Turn what `command` returns or raises into the exit code of the process.

    It says what was done, whatever became of the output; what is missing there is said.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = tried(lambda: command(*args, **kwargs))
        except KeyboardInterrupt:
            code = died_by_signal(2)
        output.flush()
        if reason := output.lost():
            output.say(f"standard output: {reason}; not all of it could be written")
        sys.exit(code)

    return run


def tried(act: Callable[[], int]) -> int:
    """What `act` returns, or the exit code of the error of a person's making, which is said."""
    try:
        return act()
    except AutoglmError as error:
        complain(error)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        complain(AutoglmError(f"{error.filename}: {error.strerror}"))
        return AutoglmError.exit_code


def complain(error: AutoglmError) -> None:
    """Say on standard error what is wrong, and what to do."""
    # An address that is wrong is repeated, and who logs in there is not to be.
    output.say(f"error: {without_logins(error.message)}")
    if error.hint:
        output.say(f"hint: {error.hint}")
