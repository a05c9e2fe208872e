"""The command within this process, which has imported torch already: export and import need it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path

from autoglm_resume.cli.app import app


def autoglm(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, for its exit code and what it prints; it must not begin a run here."""
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    arguments, code = [str(word) for word in words], 0
    os.chdir(cwd or here)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app(arguments, prog_name="autoglm")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
