from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BUCKET, S3Server

ID = "step-0000000010.a0"

Make = Callable[[int], Path]


class GoogleServer(S3Server):
    """The same server to a client of Google Cloud: its XML API is that of S3, but for who asks."""

    url = f"gs://{BUCKET}/some/prefix"
    access = ()


@pytest.fixture
def gs(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    """A running server, with an environment that leads to it."""
    server = GoogleServer(s3.rclone, tmp_path / "gs")
    server.start()
    account = {"gcs_base_url": server.endpoint, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    yield server
    server.stop()


@pytest.fixture(params=["directory", "s3", "gs"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "directory":
        return str(request.getfixturevalue(request.param).url)
    (tmp_path / "replica").mkdir()
    return str(tmp_path / "replica")


@pytest.fixture
def a_file(tmp_path: Path) -> Make:
    def make(size: int) -> Path:
        path = tmp_path / f"of-{size}"
        path.write_bytes(os.urandom(size))
        return path

    return make
