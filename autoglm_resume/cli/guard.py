"""What every command has in common: it returns its exit code, and no error of a person's making
shows a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from autoglm_resume.errors import AutoglmError, died_by_signal

P = ParamSpec("P")


def guarded(command: Callable[P, int]) -> Callable[P, None]:
    """Turn what `command` returns or raises into the exit code of the process."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        sys.exit(_code(command, *args, **kwargs))

    return run


def _code(command: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    try:
        code = command(*args, **kwargs)
        sys.stdout.flush()
    except AutoglmError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        return died_by_signal(2)
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return died_by_signal(13)
    except OSError as error:
        if error.filename is None:
            raise
        complain(AutoglmError(f"{error.filename}: {error.strerror}"))
        return AutoglmError.exit_code
    return code


def complain(error: AutoglmError) -> None:
    """Say on standard error what is wrong, and what to do."""
    print(f"autoglm: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"autoglm: hint: {error.hint}", file=sys.stderr)
