from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_resume import files
from autoglm_resume.checkpoint.storage.directory import Directory
from tests.checkpoint.storage.conftest import ID, Make


def test_one_that_does_not_exist_is_not_made_because_it_may_be_a_missing_mount(
    tmp_path: Path, a_file: Make
) -> None:
    place = Directory(tmp_path / "nfs", "run")
    with pytest.raises(FileNotFoundError, match="mount"):
        place.names()
    with pytest.raises(FileNotFoundError, match="mount"):
        place.put(f"{ID}/file", a_file(1))
    assert not (tmp_path / "nfs").exists()


def test_what_a_dead_process_left_half_written_is_neither_listed_nor_kept(
    tmp_path: Path, a_file: Make
) -> None:
    place = Directory(tmp_path, "run")
    place.put(f"{ID}/other", a_file(1))
    half = tmp_path / "run" / ID / f"{files.TEMPORARY}0123-file"
    half.write_bytes(b"half")
    assert place.names() == {f"{ID}/other": 1}
    place.put(f"{ID}/file", a_file(2))
    assert not half.exists()


def test_an_interrupted_removal_is_finished_by_the_next(tmp_path: Path, a_file: Make) -> None:
    place = Directory(tmp_path, "run")
    place.put(f"{ID}/file", a_file(1))
    grave = tmp_path / "run" / f"{files.TEMPORARY}0123-{ID}0"
    grave.mkdir()
    (grave / "file").touch()
    assert place.names() == {f"{ID}/file": 1}
    place.remove(ID)
    assert list((tmp_path / "run").iterdir()) == []
