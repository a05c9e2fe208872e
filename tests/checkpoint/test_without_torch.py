from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_the_pure_modules_and_the_store_never_import_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    script: Callable[[str], str] = "import sys; import {0}; print(*sys.modules)".format
    for name in (
        *("format.manifest", "format.structure", "chunks.codec"),
        *("store.store", "store.gate", "store.retention"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script(f"autoglm_resume.checkpoint.{name}")],
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = set(done.stdout.split())
        assert not loaded & {"torch", "numpy", "pydantic", "typer", "rich", "pickle"}, name
