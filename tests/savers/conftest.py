from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.savers.saver import SaverHome


@pytest.fixture
def home(tmp_path: Path) -> Iterator[SaverHome]:
    made = SaverHome(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    assert not made.log.exists() or made.log.read_text() == ""
