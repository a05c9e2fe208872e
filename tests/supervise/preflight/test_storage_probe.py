from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from autoglm_resume.supervise.preflight.storage_probe import StorageProbe


def test_a_directory_answers_even_before_it_is_made(tmp_path: Path) -> None:
    here, coming = StorageProbe([str(tmp_path), str(tmp_path / "a" / "b")]).answers()
    assert (here.error, here.replica, here.hung) == ("", False, False)
    assert coming.error == ""


def test_a_replica_has_to_be_there_because_it_may_be_a_missing_mount(tmp_path: Path) -> None:
    here, missing = StorageProbe([], [str(tmp_path), str(tmp_path / "mount")]).answers()
    assert (here.error, here.replica) == ("", True)
    assert missing.error == "there is no such directory: make it, or mount it"


def test_a_place_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    reach = StorageProbe([str(tmp_path)], [str(tmp_path)])
    while len(reach.pids) < 2:  # on a busy machine one may have answered by now
        reach.answers()
        reach = StorageProbe([str(tmp_path)], [str(tmp_path)])
    os.kill(min(reach.pids), signal.SIGSTOP)
    hung, fine = sorted(reach.answers(within=3.0), key=lambda place: not place.hung)
    assert (hung.hung, hung.error) == (True, "no answer within 3 s")
    assert (fine.hung, fine.error) == (False, "")
    assert reach.pids == frozenset()  # that one could be ended


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (place,) = StorageProbe([str(tmp_path / "a")]).answers()
    assert "NotADirectoryError" in place.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    (place,) = StorageProbe([str(tmp_path)]).answers()
    tmp_path.chmod(0o755)
    assert "may not write" in place.error


def test_a_bucket_that_is_not_there_is_told() -> None:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    (place,) = StorageProbe([], ["s3://bucket/prefix"], environment).answers(60.0)
    assert place.error
    assert "secret" not in place.error
