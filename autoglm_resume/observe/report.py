from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from autoglm_resume.observe.live import Screen


@contextlib.contextmanager
def afterwards(directory: Path, screen: Screen, *, json: bool) -> Iterator[None]:
    yield
